"""Regions of the metrics: inside and outside the mask, its boundary, and effects outside."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lora.losses import default_band_width
from moe_lora.masks import boundary_band, check_mask
from moe_lora.metrics.validation import check_pair

REGIONS = ("whole", "inside", "outside", "boundary", "effect")
"""Names of all regions."""

EFFECT_THRESHOLD = 0.05
"""Mean difference of source and target above which a pixel outside the mask is an effect."""

SIZES = (("small", 0.05), ("medium", 0.1), ("large", 1.0))
"""Names of mask sizes, with the upper limit of the masked share of the image."""


def regions(
    mask: Tensor,
    source: Tensor | None = None,
    target: Tensor | None = None,
    *,
    band_width: int | None = None,
    effect_threshold: float = EFFECT_THRESHOLD,
) -> dict[str, Tensor]:
    """Compute the regions of the metrics.

    whole = 1, inside = [mask >= 0.5], outside = 1 - inside,
    boundary = boundary_band(mask, band_width),
    effect = outside * [mean over the channels of abs(source - target) > effect_threshold]

    The effect region contains changes by the object outside the mask, such as shadows and
    reflections.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        source: `(B, 3, H, W)`, image with the object in [0, 1]; required for the effect region.
        target: `(B, 3, H, W)`, image without the object in [0, 1]; required with `source`.
        band_width: width of the boundary band on each side of the edge in pixels; `None` for
            `moe_lora.losses.default_band_width(H, W)`.
        effect_threshold: threshold of the effect region, in [0, 1).

    Returns:
        `(B, 1, H, W)`, bool, by the names of `REGIONS`.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`, or an image
            is invalid or of another size.
        ValueError: if only one image is given, or the threshold is outside [0, 1).

    Example:
        >>> mask = torch.zeros(1, 1, 8, 8)
        >>> mask[..., 4:] = 1
        >>> target = torch.zeros(1, 3, 8, 8)
        >>> source = target.clone()
        >>> source[..., 2:] = 0.5
        >>> found = regions(mask, source, target, band_width=1)
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
    if (source is None) != (target is None):
        given, missing = ("target", "source") if source is None else ("source", "target")
        raise ValueError(f"Expected `{missing}` to be given with `{given}`, but got None.")
    if source is None or target is None:
        return found
    if not 0 <= effect_threshold < 1:
        raise ValueError(
            f"Expected `effect_threshold` to be in [0, 1), but got {effect_threshold}."
        )
    first, second = check_pair(source, target, names=("source", "target"))
    if (first.shape[0], *first.shape[2:]) != (inside.shape[0], *inside.shape[2:]):
        raise ValueError(
            f"Expected `source` to have the batch and image size of `mask`, "
            f"{tuple(inside.shape)}, but got "
            f"{tuple(first.shape)}."
        )
    changed = (first - second).abs().mean(1, keepdim=True) > effect_threshold
    return found | {"effect": changed & ~inside}


def mask_sizes(mask: Tensor, sizes: Sequence[tuple[str, float]] = SIZES) -> list[str]:
    """Classify masks by their share of the image.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        sizes: names with increasing upper limits of the share; the last limit is ignored.

    Returns:
        One name per sample, a list of length B.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.
        ValueError: if the limits do not increase.

    Example:
        >>> mask = torch.zeros(2, 1, 10, 10)
        >>> mask[0, :, :2, :2], mask[1, :, :5] = 1, 1
        >>> mask_sizes(mask)
        ['small', 'large']
    """
    limits = [limit for _, limit in sizes]
    if not limits or limits != sorted(set(limits)):
        raise ValueError(f"Expected the limits of `sizes` to increase, but got {limits}.")
    areas = check_mask(mask).mean((1, 2, 3)).tolist()
    last = sizes[-1][0]
    return [next((name for name, limit in sizes if area < limit), last) for area in areas]
