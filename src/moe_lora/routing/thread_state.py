"""The thread-local part of a model's routing state."""

from __future__ import annotations

import threading
from typing import Any

from moe_lora.routing.routers.base import RoutingDecision
from moe_lora.routing.steering import NO_STEERING


class ThreadState:
    """Routing state of one thread.

    Attributes:
        steering: the steering of the innermost open context, for compiled graphs.
        decisions: weights and logits of the last pass by adapter, with gradient.
        has_run: whether a pass has run since the attribute was set to false.
    """

    def __init__(self) -> None:
        self.steering = NO_STEERING
        self.decisions: dict[str, RoutingDecision] = {}
        self.has_run = False


class PerThread(threading.local):
    """Thread-local `ThreadState`, in the attribute `state`.

    The attribute is set once only: compiled code loses what it assigns to an attribute of a
    `threading.local` subclass.
    """

    def __init__(self) -> None:
        self.state = ThreadState()

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread:
        return PerThread()

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()
