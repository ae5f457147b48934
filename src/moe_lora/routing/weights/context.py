"""Where the layers of a model find the routing of the pass that they run in."""

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


class _Entry(NamedTuple):
    """A routing, and the backward pass inside which it holds (-1 outside of any).

    `call` is the number of the module call that makes the pass; see `number_of_call`.
    """

    routing: Routing | None
    graph_task: int
    call: int = _NO_CALL


_NOTHING = _Entry(None, -1)
_UNIFORM = Routing()

# The routing of the pass whose blocks are computed again, by backward pass and lineage of models.
# The graph of the pass keeps it alive.
_RECOMPUTED: WeakValueDictionary[tuple[int, int], Routing] = WeakValueDictionary()


class _Nesting:
    """The passes that are under way in one thread, the innermost apart from the outer ones."""

    def __init__(self) -> None:
        self.entry = _NOTHING
        self.outer: list[_Entry] = []

    def pop(self) -> _Entry:
        """Take the innermost entry off."""
        popped, self.entry = self.entry, self.outer.pop() if self.outer else _NOTHING
        return popped

    def mark(self) -> Callable[[], None]:
        """Return a function that brings back what holds now."""
        depth, entry = len(self.outer), self.entry

        def put_back() -> None:
            self.entry = entry
            del self.outer[depth:]

        return put_back

    def forget_interrupted(self, call: int = _NO_CALL) -> None:
        """Drop what was left by errors after which nothing is called.

        These are errors in a backward pass, and those that are no `Exception` in a forward pass.

        Args:
            call: the number of the call that begins now, which an interrupted one may have had.
        """
        if self.entry is _NOTHING and not self.outer:
            return
        running, frame = {_NO_CALL, _COMPILED_CALL}, sys._getframe().f_back
        while frame is not None:
            running.add(id(frame))
            frame = frame.f_back
        if call > 0:
            running.discard(call)
        in_backward = graph_task() != -1
        left = [
            entry
            for entry in (*self.outer, self.entry)
            if entry.call in running and (in_backward or entry.graph_task == -1)
        ]
        self.entry = left.pop() if left else _NOTHING
        self.outer[:] = left


class _Passes(threading.local):
    """The passes that are under way in this thread, in an attribute that is never set again.

    What compiled code stores in a subclass of `threading.local` is lost.

    A copy of the model shares it with the original: a pass routes all layers of one lineage that it
    meets, so that a copied block routes in the place of the block that it was copied from.

    Args:
        lineage: the same for a model and its copies, pickled ones included.
    """

    def __init__(self, lineage: str) -> None:
        self.lineage = lineage
        self.nesting = _Nesting()

    @classmethod
    def of(cls, lineage: str) -> _Passes:
        """Return the passes of a lineage of models."""
        return _PASSES.setdefault(lineage, cls(lineage))

    def __reduce__(self) -> tuple[Callable[[str], _Passes], tuple[str]]:
        return _Passes.of, (self.lineage,)


_PASSES: WeakValueDictionary[str, _Passes] = WeakValueDictionary()


def number_of_call() -> int:
    """Return what is the same in the hooks of one module call, for a hook of `nn.Module` to ask."""
    if torch.compiler.is_compiling():
        return _COMPILED_CALL
    frame = sys._getframe(2)
    # Hooks are called by a function inside of `_call_impl`, or by itself after an error.
    call = frame.f_back if frame.f_code.co_name == "inner" else frame
    return id(call)  # CPython keeps a frame object, once it is made, until the frame has run


class RoutingContext:
    """Hand the routing of a forward pass to the layers that run in it.

    All adapted layers of a model share one context. What it holds belongs to one pass in one
    thread: nested passes, other threads and other models have theirs.

    Attributes:
        required: the adapters that a router, and so the pass, must decide the weights of; others
            are mixed uniformly where no routing is found.
    """

    def __init__(self) -> None:
        self.required: set[str] = set()
        self._passes = _Passes.of(uuid4().hex)

    def enter(self, routing: Routing | None, call: int = _NO_CALL) -> None:
        """Begin a pass, or a part of one that has a routing of its own.

        Args:
            routing: that of the pass, if it is known already.
            call: what `number_of_call` says in the hook that begins a pass.
        """
        passes = self._passes.nesting
        if not torch.compiler.is_compiling():
            passes.forget_interrupted(call)
        passes.outer.append(passes.entry)
        passes.entry = _Entry(routing, graph_task(), call)

    def decide(self, routing: Routing) -> None:
        """Set the routing of the pass that began last."""
        passes = self._passes.nesting
        passes.entry = _Entry(routing, passes.entry.graph_task, passes.entry.call)

    def leave(self, call: int) -> Routing | None:
        """End a pass, and return its routing; do nothing where the pass never began.

        Args:
            call: what `number_of_call` says in the hook that ends the pass.
        """
        passes = self._passes.nesting
        if passes.entry.call not in (call, _COMPILED_CALL) and call != _COMPILED_CALL:
            # A hook before ours failed, or a context that was entered in the pass is still open.
            if all(entry.call != call for entry in passes.outer):
                return None
            while passes.entry.call != call:
                passes.pop()
        return passes.pop().routing

    @contextmanager
    def use(self, routing: Routing | None) -> Iterator[None]:
        """Let a routing hold for the layers that run inside the context."""
        self.enter(routing)
        passes = self._passes.nesting
        entry = passes.entry
        try:
            yield
        finally:
            if torch.compiler.is_compiling() or passes.entry is entry:
                passes.pop()
            elif entry in passes.outer:  # a pass has begun in the context that goes on behind it
                passes.outer.remove(entry)

    def current(self) -> Routing | None:
        """Return the routing of the pass that runs now, or whose blocks are computed again."""
        passes = self._passes.nesting
        entry = passes.entry
        if torch.compiler.is_compiling():
            return entry.routing
        task = graph_task()
        if task == -1 and entry.graph_task != -1:
            passes.forget_interrupted()
            entry = passes.entry
        if entry is not _NOTHING and entry.graph_task == task:
            return entry.routing
        return None if task == -1 else _RECOMPUTED.get((task, id(self._passes)))

    def recomputed(self) -> Routing | None:
        """Return the routing of the pass whose backward pass runs now, if any."""
        return None if graph_task() == -1 else self.current()

    def of_adapter(self, adapter_name: str) -> Routing:
        """Return the routing that one adapter of a layer is mixed by.

        Raises:
            RuntimeError: when no pass of the model is under way that decides its weights.
        """
        routing = self.current() or self.outside()
        if routing is not None and adapter_name in routing.weights:
            if routing.weights[adapter_name] is not None and torch.compiler.is_exporting():
                raise RuntimeError(
                    "Expected an export without routing weights, which would be baked into the "
                    "exported program. Fix the mixture first with moe_lora.merge(model, weights), "
                    'or export in uniform mode (moe_lora.set_routing_mode(model, "uniform")).'
                )
            return routing
        if adapter_name in self.required:
            raise RuntimeError(
                f"Expected routing weights for adapter {adapter_name!r}, whose router is asked "
                "when the adapted model is called, but a layer ran outside of a call. Call the "
                "model itself, not its `forward` or its blocks, or hand weights over with "
                "`with moe_lora.route(model, weights):`. In the backward pass of a checkpointed "
                "block: add the model's output to the loss, or checkpoint with "
                "moe_lora.routing.routed_checkpoint(model)."
            )
        return _UNIFORM if routing is None else routing

    def outside(self) -> Routing | None:
        """Return the routing of layers that run outside of any pass."""
        return None

    def restore_in_backward(self, output: Any, routing: Routing) -> None:
        """Let a pass's blocks that are computed again in its backward pass find its routing.

        The gradient of a pass's output comes before those of its blocks.

        Args:
            output: what the model returned.
            routing: the routing of that pass.
        """
        passes = self._passes  # all that the graph keeps alive besides the routing

        def restore(grad: Tensor) -> None:
            task, mine = graph_task(), passes.nesting
            if mine.entry.graph_task != task:
                Variable._execution_engine.queue_callback(mine.mark())
                mine.outer.append(mine.entry)
            # A compiled block looks into its own thread; blocks on other devices run in others.
            mine.entry = _Entry(routing, task)
            _RECOMPUTED[task, id(passes)] = routing

        for tensor in () if is_transformed() else tensors_in(output):
            # A leaf is no output of the blocks, and would collect the hooks of all passes.
            if tensor.grad_fn is not None:
                tensor.register_hook(restore)

    def fixed_weights(self, adapter_name: str) -> Tensor | None:
        """Return the `(E,)` weights that an adapter may be merged with; `None` means uniform."""
        return None


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of what a model returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif hasattr(output, "__dataclass_fields__"):
        yield from tensors_in(vars(output))
