"""The slot through which routing weights reach the layers of one model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Middle = tuple[int, int] | Literal["layers"]
"""What the middle dimension of `(B, N, E)` weights counts: the tokens of a grid of rows and columns
that a model may resample, or the adapted layers. Where nothing is said, tokens as the layers see
them.
"""


class Snapshot(NamedTuple):
    """Remember what a slot held during one forward pass."""

    weights: Mapping[str, Tensor]
    chosen: Mapping[str, Tensor]
    middle: Mapping[str, Middle]
    learners: Tensor | None
    stamp: Tensor


class WeightSlot:
    """Hold the routing weights of the current forward pass, by adapter name.

    An adapter without an entry is mixed uniformly. All adapted layers of a model share one slot; a
    deep or pickled copy of the model gets a slot of its own, empty, since the weights belong to a
    forward pass and not to the model.

    Attributes:
        weights: `(B, E)`, `(B, T, E)` or `(B, L, E)` per adapter.
        chosen: `(B, k)` or `(B, L, k)` per adapter of which only `k` weights in every row of
            `(B, E)` or `(B, L, E)` count: the indices of these experts.
        middle: what the middle dimension of an adapter's weights counts.
        learners: `(B, E)`, 1 where a sample's gradient reaches the parameters of an expert and 0
            where not; `None` where it reaches all.
        stamp: an integer on the CPU that changes with the weights.
    """

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] = {}
        self.chosen: Mapping[str, Tensor] = {}
        self.middle: Mapping[str, Middle] = {}
        self.learners: Tensor | None = None
        self._top_k: Mapping[str, int | None] = {}
        self.stamp = torch.zeros((), dtype=torch.int64, device="cpu")

    def put(
        self,
        weights: Mapping[str, Tensor],
        top_k: Mapping[str, int | None] | None = None,
        middle: Mapping[str, Middle] | None = None,
    ) -> None:
        """Replace the weights of every adapter.

        Args:
            weights: by adapter name.
            top_k: how many weights of a row are not zero, for the adapters where that is known.
            middle: what the middle dimension of `(B, N, E)` weights counts, where that is known.
        """
        held, top_k, middle = self.weights, top_k or {}, middle or {}
        same = held.keys() == weights.keys() and all(held[name] is weights[name] for name in held)
        if same and top_k == self._top_k and middle == self.middle:
            return
        self.weights, self._top_k, self.stamp = dict(weights), dict(top_k), self.stamp + 1
        self.middle = dict(middle)
        self.chosen = {
            name: weights[name].detach().topk(k, dim=-1).indices
            for name, k in top_k.items()
            if k is not None
            and (weights[name].ndim == 2 or middle.get(name) == "layers")
            and k < weights[name].shape[-1]
        }
        for tensor in (*self.weights.values(), *self.chosen.values()):
            _let_sizes_change(tensor)

    def teach(self, learners: Tensor | None) -> None:
        """Let the coming passes teach only some experts, sample by sample; `None` for all.

        Args:
            learners: `(B, E)`.
        """
        self.learners, self.stamp = learners, self.stamp + 1
        if learners is not None:
            _let_sizes_change(learners)

    def snapshot(self) -> Snapshot:
        """Return what the slot holds now."""
        return Snapshot(self.weights, self.chosen, self.middle, self.learners, self.stamp)

    @contextmanager
    def restored(self, snapshot: Snapshot) -> Iterator[None]:
        """Let the slot hold an earlier snapshot inside the context."""
        current = self.snapshot()
        self.weights, self.chosen, self.middle, self.learners, self.stamp = snapshot
        try:
            yield
        finally:
            self.weights, self.chosen, self.middle, self.learners, self.stamp = current

    def of_layer(
        self, adapter_name: str, place: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return what an adapter's weights, and the chosen experts, are for one layer.

        Args:
            adapter_name: whose weights.
            place: `(1,)`, the layer's index among the adapted ones, on the CPU.

        Returns:
            Weights `(E,)`, `(B, E)` or `(B, T, E)` and chosen `(B, k)`; `None` for uniform weights
            and for all experts.
        """
        weights, chosen = self.weights.get(adapter_name), self.chosen.get(adapter_name)
        if weights is None or self.middle.get(adapter_name) != "layers":
            return weights, chosen
        assert place is not None
        return _at(weights, place), None if chosen is None else _at(chosen, place)

    def grid_of(self, adapter_name: str) -> tuple[int, int] | None:
        """Return the grid of an adapter's token weights, where the model may resample it."""
        middle = self.middle.get(adapter_name)
        return None if middle is None or middle == "layers" else middle

    def fixed_weights(self, adapter_name: str) -> Tensor | None:
        """Return the `(E,)` weights that an adapter may be merged with; `None` means uniform."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        fresh = WeightSlot().__dict__
        return {**self.__dict__, **fresh}


def _at(values: Tensor, place: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # a number would be one more graph for every layer
        return values.index_select(1, place.to(values.device)).squeeze(1)
    return values[:, int(place)]


def _let_sizes_change(weights: Tensor) -> None:
    """Tell a compiler, where one is at work, that batch and tokens may differ from call to call.

    A compiled block reads the weights from the slot, where its caller cannot mark them.
    """
    if "torch._dynamo" in sys.modules and not torch.compiler.is_compiling():
        for dimension in range(weights.ndim - 1):
            torch._dynamo.maybe_mark_dynamic(weights, dimension)
