"""The routing state of a model: its mode, given inputs, statistics and the current routing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from moe_lora.routing.decision import routing_from_decisions, run_router
from moe_lora.routing.inputs import GivenInputs
from moe_lora.routing.model_call import MaskCache, ModelCall
from moe_lora.routing.open_contexts import OpenContexts
from moe_lora.routing.routers.base import Router
from moe_lora.routing.routers.gating import check_task_hint, task_hints
from moe_lora.routing.statistics import RoutingStats
from moe_lora.routing.steering import NO_STEERING, Override, Steering
from moe_lora.routing.thread_state import PerThread, ThreadState
from moe_lora.routing.weights.checkpointing import match_recomputed
from moe_lora.routing.weights.context import RoutingContext
from moe_lora.routing.weights.fitting import fit_to_call
from moe_lora.routing.weights.routing import Routing

RoutingMode = Literal["routed", "uniform"]


class RoutingState(RoutingContext):
    """Routing state of one model, which decides the routing of every forward pass.

    Weights from `route` override the mode, and the uniform mode overrides the router.

    Attributes:
        routers: the model's routers by adapter name.
        expert_names: the experts by adapter name.
        layer_names: the layer paths by adapter name, in the order of weights per layer.
        mode: "routed" or "uniform"; set by `set_mode`.
        given: the router inputs from `set_router_inputs`.
        stats: the routing statistics by adapter name.
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
        self._contexts = OpenContexts(self._threads)

    def add_adapter(
        self, adapter_name: str, expert_names: tuple[str, ...], layer_names: tuple[str, ...] = ()
    ) -> None:
        """Add an adapter with its experts and layers."""
        self.expert_names[adapter_name] = expert_names
        self.layer_names[adapter_name] = layer_names
        self.stats[adapter_name] = RoutingStats(expert_names)

    def remove_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        decisions = self.thread_state.decisions
        for by_adapter in (self.expert_names, self.layer_names, self.stats, decisions):
            by_adapter.pop(adapter_name, None)
        self.routed_adapters.discard(adapter_name)

    def update_experts(self, adapter_name: str, expert_names: tuple[str, ...]) -> None:
        """Update an adapter's experts; the statistics are reset when their number changes."""
        self.expert_names[adapter_name] = expert_names
        stats = self.stats[adapter_name]
        resized = len(expert_names) != len(stats.expert_names)
        stats.expert_names = expert_names
        if resized:
            stats.reset()
        self.thread_state.decisions.pop(adapter_name, None)

    @property
    def has_open_contexts(self) -> bool:
        """Return whether a context, such as `route`, is open in any thread."""
        return self._contexts.is_open

    def update_routed_adapters(self) -> None:
        """Update the adapters that must not be mixed uniformly outside of a pass."""
        self.routed_adapters.clear()
        self.routed_adapters.update(self.routers if self.mode == "routed" else ())

    def decide_routing(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        adapter_names: Iterable[str],
        routers: nn.ModuleDict,
        original: Routing | None = None,
    ) -> Routing:
        """Decide the routing of `model(*args, **kwargs)`.

        Args:
            model: the adapted model, or a replica of it.
            args: the call's positional arguments.
            kwargs: the call's keyword arguments.
            adapter_names: the adapters that contribute to the output.
            routers: the routers of the model, or of the replica, by adapter name.
            original: in a recomputation, the routing of the original pass.

        Raises:
            RuntimeError: in a replica of DataParallel inside a context of another thread, or when
                a checkpoint recomputes the pass with a different routing.
        """
        steering, thread_state = self.steering, self.thread_state
        thread_state.has_run = True
        if original is None:  # a recomputed pass keeps the decisions of the original
            thread_state.decisions = {}
        if (
            getattr(model, "_is_replica", False)
            and self.has_open_contexts
            and steering is NO_STEERING
        ):
            raise RuntimeError(
                "Expected no moe_lora.route, teach_experts or ablate_expert around DataParallel, "
                "since contexts do not reach its threads. Use DistributedDataParallel, or open the "
                "context inside the module that DataParallel wraps."
            )
        names = list(adapter_names)
        routed = [name for name in names if name in routers]
        if steering.override is not None:
            routing = self._routing_from_override(steering.override, names, (model, args, kwargs))
        elif self.mode == "uniform" or not routed:
            routing = Routing(dict.fromkeys(names))
        else:
            given, call = steering.given or self.given, (model, args, kwargs)
            routing = self._run_routers(routed, given, call, routers, record=original is None)
        routing = self._apply_steering(routing, steering, names)
        return routing if original is None else match_recomputed(routing, original)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
    def _run_routers(
        self,
        names: list[str],
        given: GivenInputs,
        called: tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]],
        routers: nn.ModuleDict,
        *,
        record: bool,
    ) -> Routing:
        """Run the routers, and record their decisions."""
        call = ModelCall.read(*called)
        inputs = call.router_inputs(given, self.mask_cache.analyze)
        by_name = {name: cast(Router, routers[name]) for name in names}
        decisions = {
            name: run_router(router, inputs, call.model) for name, router in by_name.items()
        }
        if record:
            for name, decision in decisions.items():
                self.stats[name].update(decision.weights.detach())
            self.thread_state.decisions = decisions
        return routing_from_decisions(decisions, by_name, call, inputs.task_hint)

    def _routing_from_override(
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
        return Routing.from_weights(
            dict.fromkeys(names, weights),
            dict.fromkeys(names, override.top_k),
            {} if grid is None else dict.fromkeys(names, grid),
            version=override.version,
        )

    def _apply_steering(
        self, routing: Routing, steering: Steering, adapter_names: Iterable[str]
    ) -> Routing:
        """Apply ablations and the gradient mask to a routing."""
        for name, expert, renormalize in steering.ablations:
            if name in adapter_names and name in self.expert_names:
                experts = len(self.expert_names[name])
                routing = routing.without_expert(name, expert, experts, renormalize=renormalize)
        mask = steering.expert_grad_mask
        return routing if mask is None else routing.with_grad_mask(mask)

    @property
    def thread_state(self) -> ThreadState:
        """Return the part of the state that belongs to the current thread."""
        return self._threads.state

    @property
    def steering(self) -> Steering:
        """Return the combined effect of the open contexts of this thread or asyncio task."""
        return self._contexts.steering

    @contextmanager
    def steer(self, **changes: Any) -> Iterator[None]:
        """Change the steering inside the context, in this thread or asyncio task only.

        It affects passes, the rest of a running pass, and layers that run outside of any pass.

        Args:
            changes: fields of `Steering`.
        """
        change = Steering(**changes)
        running = self.current()
        with self._contexts.opened(change, self._routing_outside_pass):
            if running is None:
                yield
            else:
                with self.use(self._steer_running_pass(running, change)):
                    yield

    def routing_outside_pass(self) -> Routing | None:
        steering = self.steering
        override = steering.override
        if override is None or torch.compiler.is_compiling() or override.is_unchanged:
            return steering.outside_pass
        return self._routing_outside_pass(steering)

    def _steer_running_pass(self, running: Routing, change: Steering) -> Routing:
        """Return the routing for the rest of a running pass."""
        names = running.weights
        if change.override is None:
            return self._apply_steering(running, change, names)
        return self._apply_steering(
            self._routing_from_override(change.override, names), self.steering, names
        )

    def _routing_outside_pass(self, steering: Steering) -> Routing:
        """Return the routing of layers that run outside of any pass."""
        if steering.override is None:
            names = [name for name in self.expert_names if name not in self.routed_adapters]
            return self._apply_steering(Routing(dict.fromkeys(names)), steering, names)
        num_experts = steering.override.weights.shape[-1]
        names = [name for name, experts in self.expert_names.items() if len(experts) == num_experts]
        return self._apply_steering(
            self._routing_from_override(steering.override, names), steering, names
        )

    def set_mode(self, mode: RoutingMode) -> None:
        """Set the routing mode.

        Args:
            mode: "routed" or "uniform".

        Raises:
            ValueError: for another mode, or for "routed" without a router.
        """
        if mode not in get_args(RoutingMode):
            raise ValueError(
                f"Expected `mode` to be one of {list(get_args(RoutingMode))}, but got {mode!r}."
            )
        if mode == "routed" and not self.routers:
            raise ValueError(
                'Expected a router for mode "routed", but the model has none. Configure one with '
                "MoELoraConfig(router=...) or attach one with moe_lora.attach_router."
            )
        self.mode = mode
        self.update_routed_adapters()

    def check_hint(self, hint: str | Sequence[str | None] | None) -> None:
        """Raise unless a task hint is valid for one of the adapters.

        Args:
            hint: the task hint, one per sample, or `None`.

        Raises:
            ValueError: for an unknown hint.
        """
        known = [hint for names in self.expert_names.values() for hint in task_hints(names)]
        check_task_hint(hint, known)

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
                f"{type(router).__name__} computes them from the input. Merge given weights with "
                "moe_lora.merge(model, weights=...), or uniform weights after "
                'moe_lora.set_routing_mode(model, "uniform").'
            )
        if weights.ndim != 1:
            raise ValueError(
                f"Expected {type(router).__name__}.fixed_weights to return (E,) weights for all "
                f"layers, but got {tuple(weights.shape)}."
            )
        return weights

    def check_num_experts(self, name: str, tensor: Tensor, adapter_names: Iterable[str]) -> None:
        """Raise unless a tensor's last dimension is the number of experts of the active adapters.

        Args:
            name: the name of the tensor, for the message.
            tensor: `(..., E)`.
            adapter_names: the active adapters, including those of other tuners; without an active
                mixture, the number of experts of any adapter is accepted.

        Raises:
            ValueError: for another number of experts, or active adapters with different numbers.
        """
        by_adapter = self.expert_names
        active = {name: by_adapter[name] for name in adapter_names if name in by_adapter}
        experts = sorted({len(names) for names in (active or by_adapter).values()})
        if tensor.shape[-1] not in experts or (active and len(experts) > 1):
            raise ValueError(
                f"Expected `{name}` to have the shape (..., E), for the experts of the active "
                f"adapters E in {experts}, but got {tuple(tensor.shape)}."
            )
