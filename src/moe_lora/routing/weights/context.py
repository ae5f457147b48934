"""Context that passes the routing of a forward pass to the layers of a model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd import Variable

from moe_lora.routing.weights.routing import Routing, graph_task
from moe_lora.tracing import is_transformed

_NO_CALL, _COMPILED_CALL = -1, 0


class _ActiveRouting(NamedTuple):
    """Routing of one pass.

    Attributes:
        routing: the routing; `None` until the pass has decided it.
        graph_task: the backward pass in which the routing is valid, -1 outside of any.
        call: the id of the module call that runs the pass; see `call_id`.
    """

    routing: Routing | None
    graph_task: int
    call: int = _NO_CALL


_NO_ROUTING = _ActiveRouting(None, -1)
_UNIFORM_ROUTING = Routing()

# Routing of a forward pass while its backward pass runs and may recompute checkpointed blocks, by
# graph task and id of the model's stacks. The graph of the pass keeps the routing alive.
_BACKWARD_ROUTINGS: WeakValueDictionary[tuple[int, int], Routing] = WeakValueDictionary()


class _RoutingStack:
    """Routings of the nested passes of one thread.

    Attributes:
        top: the routing of the innermost pass.
        outer: the routings of the passes around it, the outermost first.
    """

    def __init__(self) -> None:
        self.top = _NO_ROUTING
        self.outer: list[_ActiveRouting] = []

    def push(self, active: _ActiveRouting) -> None:
        """Add the routing of a nested pass."""
        self.outer.append(self.top)
        self.top = active

    def pop(self) -> _ActiveRouting:
        """Remove and return the routing of the innermost pass."""
        popped, self.top = self.top, self.outer.pop() if self.outer else _NO_ROUTING
        return popped

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores the present stack."""
        depth, top = len(self.outer), self.top

        def restore_stack() -> None:
            self.top = top
            del self.outer[depth:]

        return restore_stack

    def drop_interrupted(self, call: int = _NO_CALL) -> None:
        """Drop passes that an error ended without a call of their post-hook.

        These are errors in a backward pass, and errors in a forward pass that are not an
        `Exception`, such as `KeyboardInterrupt`.

        Args:
            call: the id of the call that begins now; an interrupted call may have had the same id.
        """
        if self.top is _NO_ROUTING and not self.outer:
            return
        running, frame = {_NO_CALL, _COMPILED_CALL}, sys._getframe().f_back
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        if call > 0:
            running.discard(call)
        in_backward = graph_task() != -1
        remaining = [
            active
            for active in (*self.outer, self.top)
            if active.call in running and (in_backward or active.graph_task == -1)
        ]
        self.top = remaining.pop() if remaining else _NO_ROUTING
        self.outer[:] = remaining


class _ThreadStacks(threading.local):
    """One routing stack per thread, shared by a model and its copies.

    A pass routes all layers with the same lineage, so that a copied block that replaces the
    original block in a model is routed in its place.

    The attribute `stack` is set once only: compiled code loses what it assigns to an attribute of a
    `threading.local` subclass.

    Args:
        lineage: an id that a model and its copies share, pickled copies included.
    """

    def __init__(self, lineage: str) -> None:
        self.lineage = lineage
        self.stack = _RoutingStack()

    @classmethod
    def for_lineage(cls, lineage: str) -> _ThreadStacks:
        """Return the stacks of a model and its copies."""
        return _STACKS_BY_LINEAGE.setdefault(lineage, cls(lineage))

    def __reduce__(self) -> tuple[Callable[[str], _ThreadStacks], tuple[str]]:
        return _ThreadStacks.for_lineage, (self.lineage,)


_STACKS_BY_LINEAGE: WeakValueDictionary[str, _ThreadStacks] = WeakValueDictionary()


def call_id() -> int:
    """Return the id of a module call, equal in its pre-hooks and its hooks.

    Call it in the hook itself: it reads the frame of the hook's caller.
    """
    if torch.compiler.is_compiling():
        return _COMPILED_CALL
    frame = sys._getframe(2)
    # Hooks are called by `inner` inside `_call_impl`, or after an error by `_call_impl` itself.
    call = frame.f_back if frame.f_code.co_name == "inner" else frame
    return id(call)  # CPython keeps a frame object, once it is made, until the frame has run


class RoutingContext:
    """Context that passes the routing of a forward pass to the layers that run in it.

    All adapted layers of a model share one context. Each thread and each nested pass has its own
    routing.

    Attributes:
        routed_adapters: the adapters that must have routing weights, since they have a router; the
            others are mixed uniformly outside of a pass.
    """

    def __init__(self) -> None:
        self.routed_adapters: set[str] = set()
        self._stacks = _ThreadStacks.for_lineage(uuid4().hex)

    def enter(self, routing: Routing | None, call: int = _NO_CALL) -> None:
        """Begin a pass, or a part of a pass with a different routing.

        Args:
            routing: the routing of the pass; `None` when `set_routing` sets it later.
            call: `call_id()` in the hook that begins the pass.
        """
        stack = self._stacks.stack
        if not torch.compiler.is_compiling():
            stack.drop_interrupted(call)
        stack.push(_ActiveRouting(routing, graph_task(), call))

    def set_routing(self, routing: Routing) -> None:
        """Set the routing of the innermost pass."""
        stack = self._stacks.stack
        stack.top = _ActiveRouting(routing, stack.top.graph_task, stack.top.call)

    def exit(self, call: int) -> Routing | None:
        """End a pass and return its routing; return `None` for a pass that never began.

        Args:
            call: `call_id()` in the hook that ends the pass.
        """
        stack = self._stacks.stack
        if stack.top.call not in (call, _COMPILED_CALL) and call != _COMPILED_CALL:
            # An earlier pre-hook failed, or a context that was opened in the pass is still open.
            if all(active.call != call for active in stack.outer):
                return None
            while stack.top.call != call:
                stack.pop()
        return stack.pop().routing

    @contextmanager
    def use(self, routing: Routing | None) -> Iterator[None]:
        """Use a routing in the layers that run inside the context."""
        self.enter(routing)
        stack = self._stacks.stack
        active = stack.top
        try:
            yield
        finally:
            if torch.compiler.is_compiling() or stack.top is active:
                stack.pop()
            elif active in stack.outer:  # a pass began inside the context and outlives it
                stack.outer.remove(active)

    def current(self) -> Routing | None:
        """Return the routing of the running pass, or of the pass that is being recomputed."""
        stack = self._stacks.stack
        active = stack.top
        if torch.compiler.is_compiling():
            return active.routing
        task = graph_task()
        if task == -1 and active.graph_task != -1:
            stack.drop_interrupted()
            active = stack.top
        if active is not _NO_ROUTING and active.graph_task == task:
            return active.routing
        return None if task == -1 else _BACKWARD_ROUTINGS.get((task, id(self._stacks)))

    def backward_routing(self) -> Routing | None:
        """Return the routing of the forward pass whose backward pass is running, if any."""
        return None if graph_task() == -1 else self.current()

    def routing_for(self, adapter_name: str) -> Routing:
        """Return the routing for one adapter of a layer.

        Args:
            adapter_name: the adapter.

        Raises:
            RuntimeError: when the adapter has a router and no forward pass of the model runs, or
                when routing weights would be baked into an exported program.
        """
        routing = self.current() or self.routing_outside_pass()
        if routing is not None and adapter_name in routing.weights:
            if routing.weights[adapter_name] is not None and torch.compiler.is_exporting():
                raise RuntimeError(
                    "Cannot export a model with routing weights: they would be baked into the "
                    "exported program. Merge a fixed mixture with moe_lora.merge(model, weights), "
                    'or export in uniform mode (moe_lora.set_routing_mode(model, "uniform")).'
                )
            return routing
        if adapter_name in self.routed_adapters:
            raise RuntimeError(
                f"No routing weights for adapter {adapter_name!r}: a layer ran outside of a call "
                "of the adapted model, which runs the router. Call the model itself, not its "
                "`forward` or its blocks, or set weights with "
                "`with moe_lora.route(model, weights):`. In the backward pass of a checkpointed "
                "block, add the model's output to the loss, or checkpoint with "
                "moe_lora.routing.routed_checkpoint(model)."
            )
        return _UNIFORM_ROUTING if routing is None else routing

    def routing_outside_pass(self) -> Routing | None:
        """Return the routing of layers that run outside of any pass."""
        return None

    def restore_in_backward(self, output: Any, routing: Routing) -> None:
        """Restore a pass's routing in its backward pass, for blocks that are recomputed there.

        The hooks of the output run before the backward passes of the blocks.

        Args:
            output: the model's output.
            routing: the routing of the pass.
        """
        stacks = self._stacks  # the hooks keep nothing else alive besides the routing

        def restore(grad: Tensor) -> None:
            task, stack = graph_task(), stacks.stack
            if stack.top.graph_task != task:
                Variable._execution_engine.queue_callback(stack.snapshot())
                stack.outer.append(stack.top)
            # A compiled block reads the stack of its thread; blocks on other devices run in others.
            stack.top = _ActiveRouting(routing, task)
            _BACKWARD_ROUTINGS[task, id(stacks)] = routing

        for tensor in () if is_transformed() else iter_output_tensors(output):
            # A leaf is not computed by the blocks, and would collect the hooks of all passes.
            if tensor.grad_fn is not None:
                tensor.register_hook(restore)

    def fixed_weights(self, adapter_name: str) -> Tensor | None:
        """Return the `(E,)` weights for merging an adapter; `None` means 1/E."""
        return None


def iter_output_tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from iter_output_tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from iter_output_tensors(value)
    elif hasattr(output, "__dataclass_fields__"):
        yield from iter_output_tensors(vars(output))
