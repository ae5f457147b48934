"""The open contexts of a model (`route`, `ablate_expert`, ...) in all threads and asyncio tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from moe_lora.routing.steering import NO_STEERING, Steering
from moe_lora.routing.thread_state import PerThread
from moe_lora.routing.weights.routing import Routing

_STEERINGS: ContextVar[Mapping[OpenContexts, Steering]] = ContextVar(
    "_STEERINGS", default=MappingProxyType({})
)
_LOCK = threading.Lock()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # untyped in torch
def _steering_in_context(contexts: OpenContexts) -> Steering:
    return _STEERINGS.get().get(contexts, NO_STEERING)


class OpenContexts:
    """Open contexts of one model.

    Args:
        threads: the thread-local state of the model, which holds the steering for compiled graphs.

    Attributes:
        is_open: whether a context is open in any thread.
    """

    def __init__(self, threads: PerThread) -> None:
        self._threads = threads
        # The effect of each context, and whether an asyncio task opened it.
        self._opened: list[tuple[Steering, bool]] = []
        self.is_open = self._is_open_in_task = False

    @property
    def steering(self) -> Steering:
        """Return the combined effect of the contexts of this thread or asyncio task."""
        if not torch.compiler.is_compiling():
            return _STEERINGS.get().get(self, NO_STEERING)
        # Reading a context variable breaks a compiled graph, so it is read only when needed: in a
        # thread with a copied context, and for interleaved asyncio tasks.
        if not self.is_open:
            return NO_STEERING
        opened = self._threads.state.steering
        must_read = opened is NO_STEERING or self._is_open_in_task
        return _steering_in_context(self) if must_read else opened

    @contextmanager
    def opened(
        self, change: Steering, routing_outside_pass: Callable[[Steering], Routing]
    ) -> Iterator[None]:
        """Add an effect inside the context, in this thread or asyncio task only.

        Args:
            change: the effect.
            routing_outside_pass: computes the routing of layers outside of any pass.
        """
        entry = (change, asyncio._get_running_loop() is not None)
        self._update(self._opened.append, entry)
        self._set((*self.steering.contexts, change), routing_outside_pass)
        try:
            yield
        finally:
            self._update(self._opened.remove, entry)
            # Contexts may close in another order than they were opened.
            others = tuple(c for c in self.steering.contexts if c is not change)
            self._set(others, routing_outside_pass)

    def _update(
        self, add_or_remove: Callable[[tuple[Steering, bool]], None], entry: tuple[Steering, bool]
    ) -> None:
        with _LOCK:
            add_or_remove(entry)
            self.is_open = bool(self._opened)
            self._is_open_in_task = any(in_task for _, in_task in self._opened)

    def _set(
        self,
        contexts: tuple[Steering, ...],
        routing_outside_pass: Callable[[Steering], Routing],
    ) -> None:
        """Set the contexts of this thread or asyncio task."""
        steering = NO_STEERING
        for change in contexts:
            steering = steering.combined_with(change)
        if contexts:
            outside = routing_outside_pass(steering)
            steering = replace(steering, outside_pass=outside, contexts=contexts)
        others = {key: value for key, value in _STEERINGS.get().items() if key is not self}
        _STEERINGS.set({**others, self: steering} if contexts else others)
        self._threads.state.steering = steering

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": [], "is_open": False, "_is_open_in_task": False}
