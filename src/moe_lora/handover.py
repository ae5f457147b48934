"""The slot through which routing weights reach the layers of one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Snapshot(NamedTuple):
    """Remember what a slot held during one forward pass."""

    weights: Mapping[str, Tensor]
    stamp: Tensor


class WeightSlot:
    """Hold the routing weights of the current forward pass, by adapter name.

    An adapter without an entry is mixed uniformly. All adapted layers of a model share one slot; a
    deep or pickled copy of the model gets a slot of its own, empty, since the weights belong to a
    forward pass and not to the model.

    Attributes:
        weights: `(B, E)` or `(B, T, E)` per adapter.
        stamp: an integer on the CPU that changes with the weights.
    """

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] = {}
        self.stamp = torch.zeros((), dtype=torch.int64)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the weights of every adapter."""
        held = self.weights
        if held.keys() == weights.keys() and all(held[k] is weights[k] for k in held):
            return
        self.weights, self.stamp = dict(weights), self.stamp + 1

    def snapshot(self) -> Snapshot:
        """Return what the slot holds now."""
        return Snapshot(self.weights, self.stamp)

    @contextmanager
    def restored(self, snapshot: Snapshot) -> Iterator[None]:
        """Let the slot hold an earlier snapshot inside the context."""
        current = self.snapshot()
        self.weights, self.stamp = snapshot
        try:
            yield
        finally:
            self.weights, self.stamp = current

    def fixed_weights(self, adapter_name: str) -> Tensor | None:
        """Return the `(E,)` weights that an adapter may be merged with; `None` means uniform."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": {}, "stamp": torch.zeros((), dtype=torch.int64)}
