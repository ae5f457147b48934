"""The part of a model's routing state that every thread has for itself."""

from __future__ import annotations

import threading
from typing import Any

from moe_lora.routing.routers.base import RoutingDecision
from moe_lora.routing.steering import NO_STEERING


class ThreadState:
    """The part of a model's routing state that belongs to one thread.

    Attributes:
        opened: the steering of the context that was opened last, for compiled graphs.
        decisions: weights and logits of the last pass by adapter, with gradient.
        has_run: whether a pass has run since this was set to false.
    """

    def __init__(self) -> None:
        self.opened = NO_STEERING
        self.decisions: dict[str, RoutingDecision] = {}
        self.has_run = False


class PerThread(threading.local):
    """The `ThreadState` of this thread, as `mine`.

    It is never set again: what compiled code stores in a subclass of `threading.local` is lost.
    """

    def __init__(self) -> None:
        self.mine = ThreadState()

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return PerThread()

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()
