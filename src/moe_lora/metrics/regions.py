"""Where to measure a removal: inside the mask, outside of it, on its edge, and in the shadow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lora.losses import default_band_width
from moe_lora.masks import boundary_band, check_mask
from moe_lora.metrics.validation import check_pair

REGIONS = ("whole", "inside", "outside", "boundary", "effect")
"""The names of all regions."""

EFFECT_THRESHOLD = 0.05
"""Outside the mask, a mean difference above this between source and truth is an effect."""

SIZES = (("small", 0.05), ("medium", 0.1), ("large", 1.0))
"""Names of mask sizes, and the masked share of the image that each stays below."""


def regions(
    mask: Tensor,
    source: Tensor | None = None,
    truth: Tensor | None = None,
    *,
    band_width: int | None = None,
    effect_threshold: float = EFFECT_THRESHOLD,
) -> dict[str, Tensor]:
    """Mark the pixels of every region.

    With `m = [mask >= 0.5]`: whole = 1, inside = m, outside = 1 - m, boundary =
    `boundary_band(mask, band_width)`, and effect = outside and [mean over the channels of
    abs(source - truth) > effect_threshold]: what the object changes outside of the mask, such as
    its shadow or its reflection.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        source: `(B, 3, H, W)`, in [0, 1], the picture with the object; without it there is no
            effect region.
        truth: `(B, 3, H, W)`, in [0, 1], the picture without the object; given with `source`.
        band_width: pixels of the band on each side of the edge; `None` for
            `moe_lora.losses.default_band_width(H, W)`.
        effect_threshold: in [0, 1).

    Returns:
        Maps `(B, 1, H, W)`, bool, by the names of `REGIONS`.

    Raises:
        TypeError, ValueError: for a mask that `moe_lora.masks.check_mask` refuses, or images that
            do not fit it.
        ValueError: for one image without the other, or a threshold outside [0, 1).

    Example:
        >>> mask = torch.zeros(1, 1, 8, 8)
        >>> mask[..., 4:] = 1
        >>> truth = torch.zeros(1, 3, 8, 8)
        >>> source = truth.clone()
        >>> source[..., 2:] = 0.5
        >>> found = regions(mask, source, truth, band_width=1)
        >>> {name: int(where.sum()) for name, where in found.items()}
        {'whole': 64, 'inside': 32, 'outside': 32, 'boundary': 16, 'effect': 16}
    """
    inside = check_mask(mask).detach() >= 0.5
    width = default_band_width(*inside.shape[2:]) if band_width is None else band_width
    found = {
        "whole": torch.ones_like(inside),
        "inside": inside,
        "outside": ~inside,
        "boundary": boundary_band(mask, width) > 0,
    }
    if (source is None) != (truth is None):
        given, missing = ("truth", "source") if source is None else ("source", "truth")
        raise ValueError(f"Expected `{missing}` together with `{given}`, but got none.")
    if source is None or truth is None:
        return found
    if not 0 <= effect_threshold < 1:
        raise ValueError(
            f"Expected `effect_threshold` to be in [0, 1), but got {effect_threshold}."
        )
    first, second = check_pair(source, truth, names=("source", "truth"))
    if (first.shape[0], *first.shape[2:]) != (inside.shape[0], *inside.shape[2:]):
        raise ValueError(
            f"Expected `source` to fit a mask of shape {tuple(inside.shape)}, but got "
            f"{tuple(first.shape)}."
        )
    changed = (first - second).abs().mean(1, keepdim=True) > effect_threshold
    return found | {"effect": changed & ~inside}


def mask_sizes(mask: Tensor, sizes: Sequence[tuple[str, float]] = SIZES) -> list[str]:
    """Name the size of every mask by its share of the image.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        sizes: names, and the share that each stays below, rising; the last one takes the rest.

    Returns:
        One name per sample.

    Raises:
        TypeError, ValueError: for a mask that `moe_lora.masks.check_mask` refuses.
        ValueError: for limits that do not rise.

    Example:
        >>> mask = torch.zeros(2, 1, 10, 10)
        >>> mask[0, :, :2, :2], mask[1, :, :5] = 1, 1
        >>> mask_sizes(mask)
        ['small', 'large']
    """
    limits = [limit for _, limit in sizes]
    if not limits or limits != sorted(set(limits)):
        raise ValueError(f"Expected the limits of `sizes` to rise, but got {limits}.")
    areas = check_mask(mask).mean((1, 2, 3)).tolist()
    last = sizes[-1][0]
    return [next((name for name, limit in sizes if area < limit), last) for area in areas]
