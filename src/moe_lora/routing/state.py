"""How a model routes: its mode, what the caller gave, and the weights of the current pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from moe_lora.handover import Middle, WeightSlot
from moe_lora.masks import MaskInfo
from moe_lora.routing.gating import task_hints
from moe_lora.routing.given_weights import fit_to_call
from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.mask_memory import MaskMemory
from moe_lora.routing.placement import place_tokens
from moe_lora.routing.readers import read_arguments, read_inputs, read_latents
from moe_lora.routing.router import Router, RoutingDecision
from moe_lora.routing.statistics import RoutingStats
from moe_lora.routing.unasked import hold, is_awaited

RoutingMode = Literal["routed", "uniform"]


@dataclass(frozen=True)
class GivenInputs:
    """Hold what the caller gave for the router to read; see `set_router_inputs`."""

    mask_info: MaskInfo | None = None
    task_hint: str | None = None
    grid_size: tuple[int, int] | None = None


class KnockedOut(NamedTuple):
    """Name an expert that is left out, and whether the others share its weight."""

    adapter_name: str
    expert: int
    renormalise: bool


class RoutingState(WeightSlot):
    """Decide the weights of every forward pass of one model.

    What is set most narrowly wins: weights handed over by `route`, then the mode, then the router.

    Attributes:
        routers: the model's routers by adapter name.
        expert_names: the experts of every adapter.
        layer_names: the paths of every adapter's layers, in the order of weights per layer.
        stats: what the router of every adapter decided so far.
        decisions: weights and logits of the last pass, with gradient.
    """

    def __init__(self, routers: nn.ModuleDict) -> None:
        super().__init__()
        self.routers = routers
        self.mode: RoutingMode = "routed"
        self.override: Tensor | None = None
        self.override_top_k: int | None = None
        self.knocked_out: tuple[KnockedOut, ...] = ()
        self.given = GivenInputs()
        self.mask_memory = MaskMemory()
        self.expert_names: dict[str, tuple[str, ...]] = {}
        self.layer_names: dict[str, tuple[str, ...]] = {}
        self.stats: dict[str, RoutingStats] = {}
        self.decisions: dict[str, RoutingDecision] = {}

    def add_adapter(
        self, adapter_name: str, expert_names: tuple[str, ...], layer_names: tuple[str, ...] = ()
    ) -> None:
        """Make room for an adapter with its experts and layers."""
        self.expert_names[adapter_name] = expert_names
        self.layer_names[adapter_name] = layer_names
        self.stats[adapter_name] = RoutingStats(expert_names)

    def remove_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        for known in (self.expert_names, self.layer_names, self.stats, self.decisions):
            known.pop(adapter_name, None)

    def route(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        adapter_names: Iterable[str],
    ) -> None:
        """Put the weights for `model(*args, **kwargs)` into the slot."""
        self.decisions = {}
        if self.override is not None:
            self._put_override(adapter_names, (model, args, kwargs))
            return
        routed = [name for name in adapter_names if name in self.routers]
        if self.mode == "uniform" or not routed:
            self.put({name: self._held_uniform(name) for name in routed if self._awaited(name)})
            return
        self.decisions, weights, middle = self._ask(routed, model, args, kwargs)
        self.put(weights, {name: _kept_experts(self.routers[name]) for name in routed}, middle)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _ask(
        self, names: list[str], model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, RoutingDecision], dict[str, Tensor], dict[str, Middle]]:
        """Return every router's decision, and its weights where the layers look for them."""
        inputs = read_inputs(
            model,
            read_arguments(model, args, kwargs),
            mask_info=self.given.mask_info,
            task_hint=self.given.task_hint,
            grid_size=self.given.grid_size,
            analyze=self.mask_memory.analyze,
        )
        decisions = {name: _decide(self.routers[name], inputs) for name in names}
        weights: dict[str, Tensor] = {}
        middle: dict[str, Middle] = {}
        for name, decision in decisions.items():
            self.stats[name].update(decision.weights.detach())
            router = self.routers[name]
            assert isinstance(router, Router)
            weights[name] = router.weights_to_use(decision, self.given.task_hint)
            if router.num_layers is not None:
                middle[name] = "layers"
            elif decision.weights.ndim == 3:
                weights[name], grid = place_tokens(
                    weights[name], read_latents(inputs.model_inputs), inputs.model_inputs, model
                )
                middle.update({} if grid is None else {name: grid})
        return decisions, weights, middle

    def set_override(self, weights: Tensor | None, top_k: int | None = None) -> None:
        """Set weights that win over mode and router, or take them back with `None`."""
        if weights is not None:
            self._check_override(weights, top_k)
        self.override, self.override_top_k = weights, top_k
        if weights is not None:
            self._put_override(self.expert_names)

    @contextmanager
    def without_expert(self, knocked_out: KnockedOut) -> Iterator[None]:
        """Set an expert's weight to 0 inside the context, whatever decides the weights."""
        before, held = self.knocked_out, (self.weights, self._top_k, self.middle)
        self.knocked_out = (*before, knocked_out)
        try:
            self.put(*held)
            yield
        finally:
            self.knocked_out = before
            super().put(*held)

    def put(
        self,
        weights: Mapping[str, Tensor],
        top_k: Mapping[str, int | None] | None = None,
        middle: Mapping[str, Middle] | None = None,
    ) -> None:
        for name, expert, renormalise in self.knocked_out:
            whole = weights.get(name)
            if whole is None:  # what the layers take for uniform
                experts = len(self.expert_names[name])
                whole = torch.full((experts,), 1 / experts)
            weights = {**weights, name: left_out(whole, expert, renormalise=renormalise)}
        super().put(weights, top_k, middle)

    def set_mode(self, mode: RoutingMode) -> None:
        """Set the mode, "routed" or "uniform"."""
        if mode not in get_args(RoutingMode):
            raise ValueError(
                f"Expected `mode` to be one of {list(get_args(RoutingMode))}, but got {mode!r}."
            )
        if mode == "routed" and not self.routers:
            raise ValueError(
                'Expected a router for mode "routed", but the model has none. Name one with '
                "MoELoraConfig(router=...) or attach one with moe_lora.attach_router."
            )
        self.mode = mode

    def check_hint(self, hint: str | None) -> None:
        """Raise unless an expert of some adapter answers to the hint."""
        known = [hint for names in self.expert_names.values() for hint in task_hints(names)]
        if hint is not None and hint not in known:
            raise ValueError(f"Expected `task_hint` to be one of {known}, but got {hint!r}.")

    def fixed_weights(self, adapter_name: str) -> Tensor | None:
        if self.override is not None and self.override.ndim == 1:
            return self.override
        if self.mode == "uniform" or adapter_name not in self.routers:
            return None
        router = self.routers[adapter_name]
        assert isinstance(router, Router)
        weights = router.fixed_weights()
        if weights is None:
            raise ValueError(
                f"Expected fixed routing weights to merge adapter {adapter_name!r}, but its "
                f"{type(router).__name__} chooses them for every input. Merge a mixture of your "
                "choice with moe_lora.merge(model, weights=...), or the uniform one after "
                'moe_lora.set_routing_mode(model, "uniform").'
            )
        if weights.ndim != 1:
            raise ValueError(
                f"Expected {type(router).__name__}.fixed_weights to return (E,) weights, which "
                f"hold for every layer, but got {tuple(weights.shape)}."
            )
        return weights

    def _check_override(self, weights: Tensor, top_k: int | None) -> None:
        if not isinstance(weights, Tensor) or not weights.is_floating_point():
            raise TypeError(
                f"Expected `weights` to be a floating-point tensor, but got {type(weights)}."
            )
        experts = {len(names) for names in self.expert_names.values()}
        if weights.ndim not in (1, 2, 3) or experts != {weights.shape[-1]}:
            raise ValueError(
                "Expected `weights` to have shape (E,), (batch, E) or (batch, tokens, E) with "
                f"E in {sorted(experts)}, but got {tuple(weights.shape)}."
            )
        if top_k is not None and not 1 <= top_k <= weights.shape[-1]:
            raise ValueError(
                f"Expected `top_k` to be in [1, num_experts={weights.shape[-1]}], but got {top_k}."
            )
        if top_k is not None and ((weights != 0).sum(-1) > top_k).any():
            raise ValueError(
                f"Expected at most `top_k`={top_k} weights of a row to differ from 0, but got more."
            )

    def _put_override(
        self,
        adapter_names: Iterable[str],
        call: tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]] | None = None,
    ) -> None:
        assert self.override is not None
        whole, grid = self.override, None
        if call is not None and not torch.compiler.is_compiling():
            whole, grid = fit_to_call(whole, *call)
        weights = {name: whole for name in adapter_names if name in self.expert_names}
        for name in filter(self._awaited, weights):
            weights[name] = hold(self.routers[name], weights[name])
        self.put(
            weights,
            dict.fromkeys(weights, self.override_top_k),
            {} if grid is None else dict.fromkeys(weights, grid),
        )

    def _awaited(self, adapter_name: str) -> bool:
        return adapter_name in self.routers and is_awaited(self.routers[adapter_name])

    def _held_uniform(self, adapter_name: str) -> Tensor:
        router, experts = self.routers[adapter_name], len(self.expert_names[adapter_name])
        device = next(router.parameters()).device
        return hold(router, torch.full((experts,), 1 / experts, device=device))

    def __getstate__(self) -> dict[str, Any]:
        forgotten: dict[str, Any] = {"override": None, "knocked_out": (), "decisions": {}}
        return {**super().__getstate__(), **forgotten}


def left_out(weights: Tensor, expert: int, *, renormalise: bool = False) -> Tensor:
    """Set one expert's weight to 0.

    Args:
        weights: `(..., E)`.
        expert: its index.
        renormalise: divide the others by their sum; rows without any other weight stay 0.

    Example:
        >>> left_out(torch.tensor([0.5, 0.3, 0.2]), 0, renormalise=True)
        tensor([0.0000, 0.6000, 0.4000])
    """
    stays = torch.arange(weights.shape[-1], device=weights.device) != expert
    kept = weights * stays.to(weights.dtype)
    if not renormalise:
        return kept
    total = kept.sum(-1, keepdim=True)
    return kept / total.where(total != 0, 1.0)


def _kept_experts(router: nn.Module) -> int | None:
    """Return how many weights of a row a router leaves different from 0, if not all."""
    assert isinstance(router, Router)
    return 1 if router.strategy == "hard" else router.top_k


def _decide(router: nn.Module, inputs: RouterInputs) -> RoutingDecision:
    # An offloading hook brings a router's weights from the meta device by itself; weights that a
    # whole-model offload has left elsewhere are used where they are.
    home = next((p.device for p in router.parameters()), inputs.hidden_states.device)
    here = inputs.hidden_states.device
    if home.type == "meta" or home == here:
        decision: RoutingDecision = router(inputs)
        return RoutingDecision(decision.weights.to(here), decision.logits.to(here))
    decision = router(inputs.to(home))
    return RoutingDecision(decision.weights.to(here), decision.logits.to(here))
