"""The router interface: one method to write."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.expert_dropout import drop_experts
from moe_lora.routing.routers.gating import RoutingStrategy, apply_task_hint, check_gate, gate


class RoutingDecision(NamedTuple):
    """Pair the weights of one call with the logits that they came from.

    Attributes:
        weights: `(B, E)`, `(B, T, E)` or `(B, L, E)`, rows sum to 1.
        logits: the same shape, before temperature, hint and strategy.
    """

    weights: Tensor
    logits: Tensor


class Router(nn.Module, ABC):
    """Decide per sample, per token, or per layer, how much each expert counts.

    A subclass writes `logits(inputs)`; strategy, temperature, task hints, statistics, saving and
    loading come from here. Create every parameter in `__init__`: the optimizer must see them. The
    parameters stay in float32 (or float64) whatever dtype the model is cast to.

    Class attributes:
        needs_mask: whether a call without a mask is an error.
        registered_name: set by `register_router`; what a checkpoint calls the class.

    Attributes:
        num_layers: `None`, or the number of adapted layers for which the router decides one by one:
            it then returns logits `(B, num_layers, E)`, in the order of `adapted_layers(model)`.
            Set it in `__init__`, from an argument of this name.
        frozen_parameters: names of the parameters that did not require gradients when the router
            was put into a model, and never will.
        expert_dropout: in training, the probability of leaving an expert out of a sample; the
            config's, once the router is in a model.

    Example:
        >>> class Favorite(Router):
        ...     def logits(self, inputs):
        ...         return torch.tensor([[2.0, 0.0, 0.0]]).expand(inputs.batch_size, 3)
        >>> Favorite()(RouterInputs(torch.zeros(1, 4, 8))).weights.round(decimals=2)
        tensor([[0.7900, 0.1100, 0.1100]])
    """

    needs_mask: ClassVar[bool] = False
    registered_name: ClassVar[str | None] = None
    init_kwargs: dict[str, Any]
    frozen_parameters: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Router:
        router = super().__new__(cls)
        # What it was built with is what a checkpoint needs to build it again.
        signature = inspect.signature(cls.__init__)
        bound = signature.bind_partial(router, *args, **kwargs)
        arguments = dict(list(bound.arguments.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        object.__setattr__(router, "init_kwargs", arguments)
        return router

    def __init__(self) -> None:
        super().__init__()
        self.expert_names: tuple[str, ...] | None = None
        self.strategy: RoutingStrategy = "soft"
        self.temperature = 1.0
        self.top_k: int | None = None
        self.expert_dropout = 0.0
        self.num_layers: int | None = None

    @abstractmethod
    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return one logit per expert, `(B, E)`, or per token and expert, `(B, T, E)`.

        With `num_layers` set, per layer and expert, `(B, L, E)`.

        Args:
            inputs: what the model was called with; floating tensors arrive in float32.
        """

    @classmethod
    def default_kwargs(cls, model: nn.Module, given: Collection[str] = ()) -> Mapping[str, Any]:
        """Return constructor arguments that can be read off the model to adapt (none by default).

        Args:
            model: the model that the router will live in.
            given: names of the arguments that the caller gives; they win over these.
        """
        return {}

    def fixed_weights(self) -> Tensor | None:
        """Return `(E,)` weights if they do not depend on the input, else `None`.

        A mixture with fixed weights can be merged into the base model.
        """
        return None

    def configure(
        self,
        expert_names: Sequence[str],
        *,
        strategy: RoutingStrategy = "soft",
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Router:
        """Set what turns logits into weights; the tuner calls this with the config's fields.

        Args:
            expert_names: the experts in the order of the logits.
            strategy: "soft", "hard" or "topk".
            temperature: divides the logits; > 0.
            top_k: how many experts stay under "topk".

        Returns:
            The router itself.

        Raises:
            ValueError: for settings that describe no gate.
        """
        check_gate(strategy, temperature, top_k, len(expert_names))
        self.expert_names = tuple(expert_names)
        self.strategy, self.temperature, self.top_k = strategy, temperature, top_k
        return self

    def forward(self, inputs: RouterInputs) -> RoutingDecision:
        """Return weights and logits for one call of the model.

        Raises:
            ValueError: when the router needs a mask and none is known, when the logits do not have
                one entry per sample and expert, or for an unknown task hint.
        """
        if self.needs_mask and inputs.mask_info is None:
            raise ValueError(
                f"{type(self).__name__} needs a mask, and the model's inputs carry none. Give it "
                "with moe_lora.set_router_inputs(model, mask=mask), route by hand with "
                "moe_lora.route(model, weights), or call "
                'moe_lora.set_routing_mode(model, "uniform").'
            )
        with torch.autocast(inputs.hidden_states.device.type, enabled=False):
            logits = self.logits(_in_float32(inputs))
            self._check_logits(logits, inputs)
            weights = self._gate(self._hinted(logits, inputs.task_hint))
        return RoutingDecision(weights, logits)

    def weights_to_use(self, decision: RoutingDecision, task_hint: str | None = None) -> Tensor:
        """Return the weights that the layers get: in training, with experts dropped at random.

        The decision itself, which auxiliary losses and statistics see, is that of all experts.

        Args:
            decision: what the router returned.
            task_hint: the hint of that call.

        Returns:
            The shape of `decision.weights`, rows sum to 1; `decision.weights` itself outside of
            training or with an `expert_dropout` of 0.

        Raises:
            ValueError: when `expert_dropout` is not in [0, 1).
        """
        if not self.training or self.expert_dropout == 0:
            return decision.weights
        return self._gate(
            drop_experts(self._hinted(decision.logits, task_hint), self.expert_dropout)
        )

    def _hinted(self, logits: Tensor, task_hint: str | None) -> Tensor:
        names = self.expert_names or [f"expert_{i}" for i in range(logits.shape[-1])]
        return apply_task_hint(logits, task_hint, names)

    def _gate(self, logits: Tensor) -> Tensor:
        return gate(logits, self.strategy, temperature=self.temperature, top_k=self.top_k)

    def _check_logits(self, logits: Tensor, inputs: RouterInputs) -> None:
        experts = logits.shape[-1] if self.expert_names is None else len(self.expert_names)
        batch, layers = inputs.batch_size, self.num_layers
        if layers is None:
            expected = f"(batch={batch}, experts={experts}) or (batch, tokens, experts)"
            fits = logits.ndim in (2, 3)
        else:
            expected = f"(batch={batch}, layers={layers}, experts={experts})"
            fits = logits.ndim == 3 and logits.shape[1] == layers
        if not fits or logits.shape[0] != batch or logits.shape[-1] != experts:
            raise ValueError(
                f"Expected {type(self).__name__}.logits to return {expected}, but got "
                f"{tuple(logits.shape)}."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # Router arithmetic is float32: `model.to(torch.bfloat16)` moves a router, but does not
        # round it.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype in (torch.float32, torch.float64) and moved.dtype in (
                torch.float16,
                torch.bfloat16,
            ):
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


def _in_float32(inputs: RouterInputs) -> RouterInputs:
    timestep = inputs.timestep
    return replace(
        inputs,
        hidden_states=_at_least_float32(inputs.hidden_states),
        timestep=None if timestep is None else _at_least_float32(timestep),
    )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
