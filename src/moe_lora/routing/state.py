"""How a model routes: its mode, what the caller gave, and the weights of the current pass."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from moe_lora.routing.decision import decide, routing_of_decisions
from moe_lora.routing.inputs import GivenInputs
from moe_lora.routing.model_call import MaskCache, ModelCall
from moe_lora.routing.routers.base import Router
from moe_lora.routing.routers.gating import task_hints
from moe_lora.routing.statistics import RoutingStats
from moe_lora.routing.steering import NO_STEERING, Override, Steering
from moe_lora.routing.thread_state import PerThread, ThreadState
from moe_lora.routing.weights.checkpointing import recomputed
from moe_lora.routing.weights.context import RoutingContext
from moe_lora.routing.weights.fitting import fit_to_call
from moe_lora.routing.weights.routing import Routing

RoutingMode = Literal["routed", "uniform"]


_STEERINGS: ContextVar[Mapping[RoutingState, Steering]] = ContextVar(
    "_STEERINGS", default=MappingProxyType({})
)
_COUNTING = threading.Lock()
_Opened = tuple[Steering, bool]  # what a context asks for, and whether a task opened it


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _steering_in_context(state: RoutingState) -> Steering:
    return _STEERINGS.get().get(state, NO_STEERING)


class RoutingState(RoutingContext):
    """Decide the routing of every forward pass of one model.

    What is set most narrowly wins: weights given by `route`, then the mode, then the router.

    Attributes:
        routers: the model's routers by adapter name.
        expert_names: the experts of every adapter.
        layer_names: the paths of every adapter's layers, in the order of weights per layer.
        mode: whether the routers are asked; `set_mode` sets it.
        given: what the caller gave for the routers to read.
        stats: what the router of every adapter decided so far.
    """

    def __init__(self, routers: nn.ModuleDict) -> None:
        super().__init__()
        self.routers = routers
        self.mode: RoutingMode = "routed"
        self.given = GivenInputs()
        self.mask_cache = MaskCache()
        self.expert_names: dict[str, tuple[str, ...]] = {}
        self.layer_names: dict[str, tuple[str, ...]] = {}
        self.stats: dict[str, RoutingStats] = {}
        self._threads = PerThread()
        self._open: list[_Opened] = []  # in any thread
        self._is_open = self._is_open_in_task = False

    def add_adapter(
        self, adapter_name: str, expert_names: tuple[str, ...], layer_names: tuple[str, ...] = ()
    ) -> None:
        """Make room for an adapter with its experts and layers."""
        self.expert_names[adapter_name] = expert_names
        self.layer_names[adapter_name] = layer_names
        self.stats[adapter_name] = RoutingStats(expert_names)

    def remove_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        decisions = self.in_thread.decisions
        for known in (self.expert_names, self.layer_names, self.stats, decisions):
            known.pop(adapter_name, None)
        self.required.discard(adapter_name)

    def require_routing(self) -> None:
        """Note which adapters the layers may not mix uniformly by themselves."""
        self.required.clear()
        self.required.update(self.routers if self.mode == "routed" else ())

    def route(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        adapter_names: Iterable[str],
        routers: nn.ModuleDict,
        before: Routing | None = None,
    ) -> Routing:
        """Decide the routing of `model(*args, **kwargs)`.

        Args:
            model: the adapted model, or a replica of it.
            args: the call's positional arguments.
            kwargs: its keyword arguments.
            adapter_names: the adapters that act.
            routers: the routers of the model, or of the replica, by adapter name.
            before: the routing of the pass that is computed again, if one is.
        """
        steering, mine = self.steering, self.in_thread
        mine.has_run = True
        if before is None:  # a checkpointed pass that is computed again decides nothing new
            mine.decisions = {}
        if getattr(model, "_is_replica", False) and self._open and steering is NO_STEERING:
            raise RuntimeError(
                "Expected moe_lora.route, teach_experts and ablate_expert outside of DataParallel, "
                "whose threads they do not reach. Use DistributedDataParallel, or open them inside "
                "the module that DataParallel wraps."
            )
        names = list(adapter_names)
        asked = [name for name in names if name in routers]
        if steering.override is not None:
            routing = self._overridden(steering.override, names, (model, args, kwargs))
        elif self.mode == "uniform" or not asked:
            routing = Routing(dict.fromkeys(names))
        else:
            given = steering.given or self.given
            routing = self._ask(asked, given, (model, args, kwargs), routers, record=before is None)
        routing = self._steered(routing, steering, names)
        return routing if before is None else recomputed(routing, before)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _ask(
        self,
        names: list[str],
        given: GivenInputs,
        called: tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]],
        routers: nn.ModuleDict,
        *,
        record: bool,
    ) -> Routing:
        """Ask the routers, and record what they decide."""
        call = ModelCall.read(*called)
        inputs = call.router_inputs(given, self.mask_cache.analyze)
        asked = {name: cast(Router, routers[name]) for name in names}
        decisions = {name: decide(router, inputs, call.model) for name, router in asked.items()}
        if record:
            for name, decision in decisions.items():
                self.stats[name].update(decision.weights.detach())
            self.in_thread.decisions = decisions
        return routing_of_decisions(decisions, asked, call, given.task_hint)

    def _overridden(
        self,
        override: Override,
        adapter_names: Iterable[str],
        call: tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]] | None = None,
    ) -> Routing:
        weights, grid = override.weights, None
        names = [name for name in adapter_names if name in self.expert_names]
        if not torch.compiler.is_compiling():
            self.check_num_experts("weights", weights, names)
            weights, grid = (
                (weights, None) if call is None else fit_to_call(weights, ModelCall.read(*call))
            )
        return Routing.of(
            dict.fromkeys(names, weights),
            dict.fromkeys(names, override.top_k),
            {} if grid is None else dict.fromkeys(names, grid),
            version=override.version,
        )

    def _steered(
        self, routing: Routing, steering: Steering, adapter_names: Iterable[str]
    ) -> Routing:
        """Apply what does not decide the weights but changes them."""
        for name, expert, renormalize in steering.ablations:
            if name in adapter_names and name in self.expert_names:
                experts = len(self.expert_names[name])
                routing = routing.without_expert(name, expert, experts, renormalize=renormalize)
        mask = steering.expert_grad_mask
        return routing if mask is None else routing.with_grad_mask(mask)

    @property
    def in_thread(self) -> ThreadState:
        """What of this state belongs to the thread that asks."""
        return self._threads.mine

    @property
    def steering(self) -> Steering:
        """What the open contexts of this thread, or of this asynchronous task, ask for."""
        if not torch.compiler.is_compiling():
            return _STEERINGS.get().get(self, NO_STEERING)
        # A context variable has no place in a graph, and is asked where only it knows the answer:
        # for a thread that was handed the context of another one, and for tasks that take turns.
        if not self._is_open:
            return NO_STEERING
        opened = self.in_thread.opened
        asked = opened is NO_STEERING or self._is_open_in_task
        return _steering_in_context(self) if asked else opened

    @contextmanager
    def steered(self, **changes: Any) -> Iterator[None]:
        """Change the steering inside the context, in this thread or asynchronous task only.

        It acts on passes, on the rest of a pass that is under way, and on layers that run outside
        of any pass.

        Args:
            changes: fields of `Steering`.
        """
        change = Steering(**changes)
        running, before = self.current(), self.steering
        opened = (change, asyncio._get_running_loop() is not None)
        self._count(self._open.append, opened)
        self._note((*before.changes, change))
        try:
            if running is None:
                yield
            else:
                with self.use(self._resteered(running, change)):
                    yield
        finally:
            self._count(self._open.remove, opened)
            # Contexts need not be left in the order in which they were entered.
            self._note(tuple(c for c in self.steering.changes if c is not change))

    def _count(self, add_or_remove: Callable[[_Opened], None], opened: _Opened) -> None:
        with _COUNTING:
            add_or_remove(opened)
            self._is_open = bool(self._open)
            self._is_open_in_task = any(in_task for _, in_task in self._open)

    def _note(self, changes: tuple[Steering, ...]) -> None:
        """Set what the open contexts of this thread, or asynchronous task, ask for."""
        steering = NO_STEERING
        for change in changes:
            steering = steering.changed_by(change)
        if changes:
            steering = replace(steering, outside=self._outside(steering), changes=changes)
        others = {state: known for state, known in _STEERINGS.get().items() if state is not self}
        _STEERINGS.set({**others, self: steering} if changes else others)
        self.in_thread.opened = steering

    def outside(self) -> Routing | None:
        steering = self.steering
        override = steering.override
        if override is None or torch.compiler.is_compiling() or override.is_unchanged:
            return steering.outside
        return self._outside(steering)

    def _resteered(self, running: Routing, change: Steering) -> Routing:
        """Make the routing of the rest of a pass that is under way."""
        names = running.weights
        if change.override is None:
            return self._steered(running, change, names)
        return self._steered(self._overridden(change.override, names), self.steering, names)

    def _outside(self, steering: Steering) -> Routing:
        """Make the routing of layers that run outside of a pass."""
        if steering.override is None:
            names = [name for name in self.expert_names if name not in self.required]
            return self._steered(Routing(dict.fromkeys(names)), steering, names)
        experts = steering.override.weights.shape[-1]
        names = [name for name, known in self.expert_names.items() if len(known) == experts]
        return self._steered(self._overridden(steering.override, names), steering, names)

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
        self.require_routing()

    def check_hint(self, hint: str | None) -> None:
        """Raise unless an expert of some adapter answers to the hint."""
        known = [hint for names in self.expert_names.values() for hint in task_hints(names)]
        if hint is not None and hint not in known:
            raise ValueError(f"Expected `task_hint` to be one of {known}, but got {hint!r}.")

    def fixed_weights(self, adapter_name: str) -> Tensor | None:
        override = self.steering.override
        if override is not None and override.weights.ndim == 1:
            return override.weights
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

    def check_num_experts(self, what: str, tensor: Tensor, adapter_names: Iterable[str]) -> None:
        """Raise unless a tensor's last dimension is the number of experts of the active adapters.

        Args:
            what: the tensor's name.
            tensor: `(..., E)`.
            adapter_names: the active adapters, those of other tuners too; where none is a mixture,
                the number must be that of any.
        """
        known = self.expert_names
        active = {name: known[name] for name in adapter_names if name in known}
        experts = sorted({len(names) for names in (active or known).values()})
        if tensor.shape[-1] not in experts or (active and len(experts) > 1):
            raise ValueError(
                f"Expected `{what}` to have the shape (..., E), for the experts of the active "
                f"adapters E in {experts}, but got {tuple(tensor.shape)}."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": [], "_is_open": False, "_is_open_in_task": False}
