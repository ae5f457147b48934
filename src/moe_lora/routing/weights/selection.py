"""Which experts count where most routing weights are 0."""

from __future__ import annotations

from torch import Tensor


def expert_indices(weights: Tensor, k: int) -> Tensor:
    """Return the experts that count where at most `k` weights of a row differ from 0.

    Args:
        weights: `(..., E)`, of any sign.
        k: in [1, E].

    Returns:
        `(..., k)`, without gradient: those of all weights that are not 0, and of others where
        there are fewer.

    Example:
        >>> import torch
        >>> expert_indices(torch.tensor([[0.0, -0.5, 1.5, 0.0]]), 2).sort().values
        tensor([[1, 2]])
    """
    return weights.detach().abs().topk(k, dim=-1).indices


def without_zeros(weights: Tensor) -> Tensor:
    """Return the weights in a graph that passes no gradient to those that are 0.

    Args:
        weights: of any shape.
    """
    return weights.where(weights != 0, 0.0)
