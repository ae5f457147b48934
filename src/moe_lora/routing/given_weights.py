"""Fit weights that the caller hands over to the samples and tokens of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moe_lora.routing.placement import place_tokens, sample_index
from moe_lora.routing.readers import latents_of, read_arguments


def fit_to_call(
    weights: Tensor, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, tuple[int, int] | None]:
    """Repeat weights for the samples of a call, and lay them over its tokens.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        model: the model that is called.
        args: the call's positional arguments.
        kwargs: its keyword arguments.

    Returns:
        What `moe_lora.routing.placement.place_tokens` returns; the weights as they are where the
        model's latents are not found.

    Raises:
        ValueError: as `sample_index` and `place_tokens` of `moe_lora.routing.placement` do.
    """
    if weights.ndim == 1:
        return weights, None
    arguments = read_arguments(model, args, kwargs)
    latents = latents_of(arguments)
    if latents is None:
        return weights, None
    if weights.shape[0] > 1:
        index = sample_index(weights.shape[0], latents, arguments)
        weights = weights if index is None else weights[index.to(weights.device)]
    return (
        (weights, None) if weights.ndim == 2 else place_tokens(weights, latents, arguments, model)
    )
