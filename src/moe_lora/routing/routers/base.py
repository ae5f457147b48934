"""The base class of routers."""

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
    """Routing weights of one call and their logits.

    Attributes:
        weights: `(B, E)`, `(B, T, E)` or `(B, L, E)`, rows sum to 1.
        logits: the same shape, before temperature, hint and strategy.
    """

    weights: Tensor
    logits: Tensor


class Router(nn.Module, ABC):
    """Base class of routers: routing weights of the experts per sample, per token or per layer.

    A subclass implements `logits(inputs)`; the base class adds strategy, temperature, task hints,
    statistics, saving and loading. Create every parameter in `__init__`: the optimizer must see
    them. The parameters stay in float32 (or float64) whatever dtype the model is cast to.

    Class attributes:
        needs_mask: whether a call without a mask is an error.
        registered_name: the name of the class in configs and checkpoints; set by `register_router`.
        new_expert_logit: the logit of an expert that `moe_lora.add_expert` adds, by default.

    Attributes:
        num_layers: `None`, or the number of adapted layers with separate weights: the logits are
            then `(B, num_layers, E)`, in the order of `adapted_layers(model)`. Set it in
            `__init__`, from an argument of this name.
        frozen_parameters: names of the parameters that did not require gradients when the router
            was attached to a model; they stay frozen.
        expert_dropout: in training, the probability of dropping an expert in a sample; taken from
            the config when the router is attached to a model.

    Example:
        >>> class Favorite(Router):
        ...     def logits(self, inputs):
        ...         return torch.tensor([[2.0, 0.0, 0.0]]).expand(inputs.batch_size, 3)
        >>> Favorite()(RouterInputs(torch.zeros(1, 4, 8))).weights.round(decimals=2)
        tensor([[0.7900, 0.1100, 0.1100]])
    """

    needs_mask: ClassVar[bool] = False
    registered_name: ClassVar[str | None] = None
    new_expert_logit: ClassVar[float] = -5.0
    init_kwargs: dict[str, Any]
    frozen_parameters: frozenset[str]

    def __new__(cls, *args: Any, **kwargs: Any) -> Router:
        router = super().__new__(cls)
        # A checkpoint stores the constructor's arguments and rebuilds the router from them.
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
            inputs: the inputs of the call; floating-point tensors are float32 or float64.
        """

    @classmethod
    def default_kwargs(cls, model: nn.Module, given: Collection[str] = ()) -> Mapping[str, Any]:
        """Return default constructor arguments for a model (none by default).

        Args:
            model: the model to adapt.
            given: names of the arguments from the caller, which override the defaults.
        """
        return {}

    def fixed_weights(self) -> Tensor | None:
        """Return `(E,)` weights if they do not depend on the input, else `None`.

        A mixture with fixed weights can be merged into the base model.
        """
        return None

    def add_expert(self, logit: float) -> None:
        """Add an expert after the others (called by `moe_lora.add_expert`, then `configure`).

        An override keeps the logits of the other experts, replaces no parameter that it need not
        change, and updates `init_kwargs`, from which a checkpoint rebuilds the router.

        Args:
            logit: the logit of the new expert for every input; training changes it.

        Raises:
            TypeError: unless a subclass overrides the method.
            ValueError: for a logit that the router cannot have.
        """
        raise TypeError(
            f"Expected a router to which experts can be added, but {type(self).__name__} has no "
            "add_expert(logit). Define it, or attach another router with moe_lora.attach_router."
        )

    def remove_expert(self, index: int) -> None:
        """Remove an expert (called by `moe_lora.remove_expert`, followed by `configure`).

        An override keeps the logits of the other experts and updates `init_kwargs`.

        Args:
            index: the index of the expert.

        Raises:
            TypeError: unless a subclass overrides the method.
            ValueError: for an expert that cannot be removed.
        """
        raise TypeError(
            f"Expected a router from which experts can be removed, but {type(self).__name__} has "
            "no remove_expert(index). Define it, or attach another router with "
            "moe_lora.attach_router."
        )

    def configure(
        self,
        expert_names: Sequence[str],
        *,
        strategy: RoutingStrategy = "soft",
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Router:
        """Set experts, strategy and temperature; the tuner calls this with the config's fields.

        Args:
            expert_names: the experts in the order of the logits.
            strategy: "soft", "hard" or "topk".
            temperature: divisor of the logits; > 0.
            top_k: the number of experts with a non-zero weight under "topk", in [1, E].

        Returns:
            The router itself.

        Raises:
            ValueError: for invalid settings; see `check_gate`.
        """
        check_gate(strategy, temperature, top_k, len(expert_names))
        self.expert_names = tuple(expert_names)
        self.strategy, self.temperature, self.top_k = strategy, temperature, top_k
        return self

    def forward(self, inputs: RouterInputs) -> RoutingDecision:
        """Return weights and logits for one call of the model.

        Args:
            inputs: the inputs of the call.

        Raises:
            ValueError: for a missing mask when `needs_mask` is set, for logits without one entry
                per sample and expert, or for an unknown task hint.
        """
        if self.needs_mask and inputs.mask_info is None:
            raise ValueError(
                f"{type(self).__name__} needs a mask, but the model's inputs contain none. Set it "
                "with moe_lora.set_router_inputs(model, mask=mask), set the weights with "
                "moe_lora.route(model, weights), or call "
                'moe_lora.set_routing_mode(model, "uniform").'
            )
        with torch.autocast(inputs.hidden_states.device.type, enabled=False):
            logits = self.logits(_inputs_in_float32(inputs))
            self._check_logits(logits, inputs)
            weights = self._gate(self._apply_task_hint(logits, inputs.task_hint))
        return RoutingDecision(weights, logits)

    def apply_expert_dropout(
        self, decision: RoutingDecision, task_hint: str | Sequence[str | None] | None = None
    ) -> Tensor:
        """Return the weights for the layers, in training with experts dropped at random.

        Auxiliary losses and statistics use the decision without dropout.

        Args:
            decision: the router's output.
            task_hint: the hint of the call, or one per sample.

        Returns:
            The shape of `decision.weights`, rows sum to 1; `decision.weights` itself in evaluation
            mode or with an `expert_dropout` of 0.

        Raises:
            ValueError: when `expert_dropout` is not in [0, 1).
        """
        if not self.training or self.expert_dropout == 0:
            return decision.weights
        return self._gate(
            drop_experts(self._apply_task_hint(decision.logits, task_hint), self.expert_dropout)
        )

    def _apply_task_hint(
        self, logits: Tensor, task_hint: str | Sequence[str | None] | None
    ) -> Tensor:
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
        # Router arithmetic is float32: `model.to(torch.bfloat16)` must not round its parameters.
        def apply_without_rounding(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.dtype in (torch.float32, torch.float64) and moved.dtype in (
                torch.float16,
                torch.bfloat16,
            ):
                return tensor.to(moved.device)
            return moved

        super()._apply(apply_without_rounding, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self


def _inputs_in_float32(inputs: RouterInputs) -> RouterInputs:
    timestep = inputs.timestep
    return replace(
        inputs,
        hidden_states=_at_least_float32(inputs.hidden_states),
        timestep=None if timestep is None else _at_least_float32(timestep),
    )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
