"""The slot through which routing weights reach the layers of one model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Snapshot(NamedTuple):
    """Remember what a slot held during one forward pass."""

    weights: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor]
    stamp: Tensor


class WeightSlot:
    """Hold the routing weights of the current forward pass, by adapter name.

    An adapter without an entry is mixed uniformly. All adapted layers of a model share one slot; a
    deep or pickled copy of the model gets a slot of its own, empty, since the weights belong to a
    forward pass and not to the model.

    Attributes:
        weights: `(B, E)` or `(B, T, E)` per adapter.
        chosen: `(B, k)` per adapter of which only `k` weights in every row of `(B, E)` count: the
            indices of these experts.
        stamp: an integer on the CPU that changes with the weights.
    """

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] = {}
        self.chosen: Mapping[str, Tensor] = {}
        self._top_k: Mapping[str, int | None] = {}
        self.stamp = torch.zeros((), dtype=torch.int64)

    def put(
        self, weights: Mapping[str, Tensor], top_k: Mapping[str, int | None] | None = None
    ) -> None:
        """Replace the weights of every adapter.

        Args:
            weights: by adapter name.
            top_k: how many weights of a row are not zero, for the adapters where that is known.
        """
        held, top_k = self.weights, top_k or {}
        same = held.keys() == weights.keys() and all(held[name] is weights[name] for name in held)
        if same and top_k == self._top_k:
            return
        self.weights, self._top_k, self.stamp = dict(weights), dict(top_k), self.stamp + 1
        self.chosen = {
            name: weights[name].detach().topk(k, dim=-1).indices
            for name, k in top_k.items()
            if k is not None and weights[name].ndim == 2 and k < weights[name].shape[-1]
        }
        for tensor in (*self.weights.values(), *self.chosen.values()):
            _let_sizes_change(tensor)

    def snapshot(self) -> Snapshot:
        """Return what the slot holds now."""
        return Snapshot(self.weights, self.chosen, self.stamp)

    @contextmanager
    def restored(self, snapshot: Snapshot) -> Iterator[None]:
        """Let the slot hold an earlier snapshot inside the context."""
        current = self.snapshot()
        self.weights, self.chosen, self.stamp = snapshot
        try:
            yield
        finally:
            self.weights, self.chosen, self.stamp = current

    def fixed_weights(self, adapter_name: str) -> Tensor | None:
        """Return the `(E,)` weights that an adapter may be merged with; `None` means uniform."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        fresh = WeightSlot().__dict__
        return {**self.__dict__, **fresh}


def _let_sizes_change(weights: Tensor) -> None:
    """Tell a compiler, where one is at work, that batch and tokens may differ from call to call.

    A compiled block reads the weights from the slot, where its caller cannot mark them.
    """
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        for dimension in range(weights.ndim - 1):
            torch._dynamo.maybe_mark_dynamic(weights, dimension)
