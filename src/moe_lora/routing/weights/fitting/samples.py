"""Step 1: one row of routing weights per sample of a call."""

from __future__ import annotations

from torch import Tensor

from moe_lora.routing.model_call.samples import sample_index


def fit_to_samples(weights: Tensor, latents: Tensor | list[Tensor]) -> Tensor:
    """Repeat the rows of given weights for the samples of a call.

    Args:
        weights: `(N, E)` or `(N, T, E)`.
        latents: `(B, ...)`, or a list of B tensors.

    Returns:
        `(B, E)` or `(B, T, E)`; see `sample_index` for the order.

    Raises:
        ValueError: as `sample_index`.

    Example:
        >>> import torch
        >>> fit_to_samples(torch.tensor([[0.3, 0.7]]), torch.zeros(2, 4, 8, 8)).shape
        torch.Size([2, 2])
    """
    index = sample_index(weights.shape[0], latents)
    return weights if index is None else weights[index.to(weights.device)]
