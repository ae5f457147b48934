"""The routing of one forward pass, and functions from one routing to another."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moe_lora.routing.weights.selection import detach_zeros, expert_indices

Dimension = tuple[int, int] | Literal["layers"]
"""Meaning of dimension 1 of `(B, N, E)` weights: the tokens of a `(rows, columns)` grid that the
model may resample, or the adapted layers. By default, the tokens of each layer's input.
"""

_VERSIONS = itertools.count(1)


def new_version() -> Tensor | None:
    """Return a unique integer on the CPU; `None` while compiling."""
    if torch.compiler.is_compiling():
        return None
    with torch.inference_mode(False):
        return torch.tensor(next(_VERSIONS), dtype=torch.int64, device="cpu")


def graph_task() -> int:
    """Return the id of the backward pass that runs in this thread, -1 outside of any."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


_UNIFORM_VERSION = torch.zeros((), dtype=torch.int64, device="cpu")


def _uniform_version() -> Tensor | None:
    return None if torch.compiler.is_compiling() else _UNIFORM_VERSION


@dataclass(frozen=True, eq=False)
class Routing:
    """Routing weights of one forward pass, by adapter name.

    Args:
        weights: `(E,)`, `(B, E)`, `(B, T, E)` or `(B, L, E)` per adapter; `None` means 1/E.
        expert_indices: `(B, k)` or `(B, L, k)` per adapter with at most `k` non-zero weights in
            every row of `(B, E)` or `(B, L, E)`: the indices of these experts. Weights of 0 get
            no gradient.
        dimension: the meaning of dimension 1 of an adapter's weights.
        expert_grad_mask: `(B, E)`, 1 where a sample's gradient reaches the parameters of an expert
            and 0 where not; `None` where it reaches all.
        version: an integer on the CPU, unique per routing; all uniform routings share one; `None`
            while compiling.
        graph_task: the backward pass in which the routing was created, -1 outside of any.
    """

    weights: Mapping[str, Tensor | None] = field(default_factory=dict)
    expert_indices: Mapping[str, Tensor] = field(default_factory=dict)
    dimension: Mapping[str, Dimension] = field(default_factory=dict)
    expert_grad_mask: Tensor | None = None
    version: Tensor | None = field(default_factory=_uniform_version)
    graph_task: int = field(default_factory=graph_task)

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, Tensor | None],
        top_k: Mapping[str, int | None] | None = None,
        dimension: Mapping[str, Dimension] | None = None,
        version: Tensor | None = None,
    ) -> Routing:
        """Create the routing of given weights.

        Args:
            weights: by adapter name.
            top_k: the maximal number of non-zero weights in a row, where it is known.
            dimension: the meaning of dimension 1 of `(B, N, E)` weights, where it is known.
            version: the version of an equal routing; a new one by default.
        """
        weights, dimension, indices = dict(weights), dimension or {}, {}
        for name, k in (top_k or {}).items():
            values = weights[name]
            if k is None or values is None or k >= values.shape[-1]:
                continue
            if values.ndim == 2 or dimension.get(name) == "layers":
                indices[name] = expert_indices(values, k)
                weights[name] = detach_zeros(values)  # here, since it is the same in every layer
        for tensor in (*weights.values(), *indices.values()):
            _mark_sizes_dynamic(tensor)
        version = new_version() if version is None else version
        return cls(weights, indices, dimension, version=version)

    @property
    def requires_grad(self) -> bool:
        """Return whether any of the weights require gradients."""
        return any(w is not None and w.requires_grad for w in self.weights.values())

    def select_layer(
        self, adapter_name: str, layer_index: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Select the weights and expert indices of one layer.

        Args:
            adapter_name: the adapter.
            layer_index: `(1,)`, the index of the layer among the adapted ones, on the CPU.

        Returns:
            Weights `(E,)`, `(B, E)` or `(B, T, E)` and indices `(B, k)`; `None` for uniform weights
            and for all experts.
        """
        weights, indices = self.weights.get(adapter_name), self.expert_indices.get(adapter_name)
        if weights is None or self.dimension.get(adapter_name) != "layers":
            return weights, indices
        assert layer_index is not None
        return _at_layer(weights, layer_index), None if indices is None else _at_layer(
            indices, layer_index
        )

    def token_grid(self, adapter_name: str) -> tuple[int, int] | None:
        """Return the grid of an adapter's token weights, if the model may resample it."""
        dimension = self.dimension.get(adapter_name)
        return None if dimension is None or dimension == "layers" else dimension

    def equals(self, other: Routing) -> bool:
        """Return whether both routings have the same weights and masks."""
        if self.weights.keys() != other.weights.keys():
            return False
        pairs = [(weights, other.weights[name]) for name, weights in self.weights.items()]
        pairs.append((self.expert_grad_mask, other.expert_grad_mask))
        return all(_equal_tensors(*pair) for pair in pairs)

    def with_grad_mask(self, expert_grad_mask: Tensor) -> Routing:
        """Return the routing with a mask on the gradients of the experts.

        Args:
            expert_grad_mask: `(B, E)`.
        """
        _mark_sizes_dynamic(expert_grad_mask)
        return replace(self, expert_grad_mask=expert_grad_mask, version=new_version())

    def without_expert(
        self, adapter_name: str, expert: int, num_experts: int, *, renormalize: bool = False
    ) -> Routing:
        """Return the routing in which one expert's weight is 0.

        Args:
            adapter_name: the adapter.
            expert: the expert's index.
            num_experts: the adapter's number of experts.
            renormalize: divide the other weights by their sum.
        """
        weights = self.weights.get(adapter_name)
        if weights is None:
            weights = torch.full((num_experts,), 1 / num_experts)
        weights = zero_expert_weight(weights, expert, renormalize=renormalize)
        return replace(self, weights={**self.weights, adapter_name: weights}, version=new_version())


def zero_expert_weight(weights: Tensor, expert: int, *, renormalize: bool = False) -> Tensor:
    """Set one expert's weight to 0.

    Args:
        weights: `(..., E)`.
        expert: the expert's index.
        renormalize: divide the other weights by their sum; a row with sum 0 stays 0.

    Returns:
        The shape of `weights`.

    Example:
        >>> zero_expert_weight(torch.tensor([0.5, 0.3, 0.2]), 0, renormalize=True)
        tensor([0.0000, 0.6000, 0.4000])
    """
    is_other = torch.arange(weights.shape[-1], device=weights.device) != expert
    others = weights * is_other.to(weights.dtype)
    if not renormalize:
        return others
    total = others.sum(-1, keepdim=True)
    return others / total.where(total != 0, 1.0)


def _equal_tensors(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    with _disable_current_modes():  # a policy of selective checkpointing would count the comparison
        return torch.equal(one, other)


def _at_layer(values: Tensor, layer_index: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # an integer would add one graph per layer
        return values.index_select(1, layer_index.to(values.device)).squeeze(1)
    return values[:, int(layer_index)]


def _mark_sizes_dynamic(weights: Any) -> None:
    """Mark batch and token dimensions as dynamic for `torch.compile`.

    A compiled block reads the weights from the context, so that its caller cannot mark them.
    """
    if weights is None or "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return
    for dimension in range(weights.ndim - 1):
        torch._dynamo.maybe_mark_dynamic(weights, dimension)
