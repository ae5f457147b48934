"""Sparse routing weights: the indices of the experts with non-zero weights."""

from __future__ import annotations

from torch import Tensor


def expert_indices(weights: Tensor, k: int) -> Tensor:
    """Return the indices of the `k` experts with the largest absolute weights.

    Args:
        weights: `(..., E)`, of any sign, at most `k` of a row non-zero.
        k: in [1, E].

    Returns:
        `(..., k)`, without gradient: every expert with a non-zero weight, filled up with others.

    Example:
        >>> import torch
        >>> expert_indices(torch.tensor([[0.0, -0.5, 1.5, 0.0]]), 2).sort().values
        tensor([[1, 2]])
    """
    return weights.detach().abs().topk(k, dim=-1).indices


def detach_zeros(weights: Tensor) -> Tensor:
    """Return the weights, with a gradient only for those that are not 0.

    Args:
        weights: of any shape.
    """
    return weights.where(weights != 0, 0.0)
