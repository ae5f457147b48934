"""Convex hull of a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks.augmentation.parameters import binary

_ROUNDING = 1e-6


def convex_hull(mask: Tensor) -> Tensor:
    """Fill the convex hull of each mask.

    A pixel is inside if its center is in the convex hull of the centers of the masked pixels. The
    left side of the hull is the convex envelope of the first masked pixel of each row, the right
    side the concave envelope of the last one. Memory is proportional to B * H².

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.

    Example:
        >>> corners = torch.zeros(1, 1, 3, 3)
        >>> corners[..., 0, 0] = corners[..., 2, 2] = corners[..., 2, 0] = 1
        >>> convex_hull(corners)[0, 0]
        tensor([[1., 0., 0.],
                [1., 1., 0.],
                [1., 1., 1.]])
    """
    inside = binary(mask)[:, 0] > 0
    width = inside.shape[2]
    position = torch.arange(width, device=inside.device, dtype=torch.float64)
    occupied = inside.any(2)
    first = torch.where(inside, position, torch.inf).amin(2)
    last = torch.where(inside, position, -torch.inf).amax(2)
    left = _convex_envelope(first, occupied)[..., None]
    right = -_convex_envelope(-last, occupied)[..., None]
    filled = (position >= left - _ROUNDING) & (position <= right + _ROUNDING)
    return filled.float()[:, None]


def _convex_envelope(values: Tensor, known: Tensor) -> Tensor:
    """Compute the convex envelope, the largest convex function of the row below all known values.

    Args:
        values: `(B, H)`, float64, one value per row.
        known: `(B, H)`, bool, rows with a value.

    Returns:
        `(B, H)`, float64; infinite before the first and after the last known row.
    """
    height = values.shape[1]
    row = torch.arange(height, device=values.device)
    after = _next_corner(values, known)
    start = known.int().argmax(1, keepdim=True)
    corner = torch.zeros_like(known).scatter_(1, start, known.gather(1, start))
    jump = after
    for _ in range(height.bit_length()):  # every round doubles the number of corners
        corner = corner | _marked(jump, corner)
        jump = jump.gather(1, jump)
    before = torch.where(corner, row, -1).cummax(1).values
    begin = before.clamp(min=0)
    end = after.gather(1, begin)
    base, top = values.gather(1, begin), values.gather(1, end)
    share = (row - begin) / (end - begin).clamp(min=1)
    between = base + share * (top - base)
    found = torch.where(row == begin, base, between)
    return torch.where((before >= 0) & (row <= end), found, torch.inf)


def _next_corner(values: Tensor, known: Tensor) -> Tensor:
    """Return, for every row, the later known row with the smallest slope, or the row itself."""
    height = values.shape[1]
    row = torch.arange(height, device=values.device)
    distance = (row[None, :] - row[:, None]).clamp(min=1)
    later = (row[None, :] > row[:, None]) & known[:, None, :] & known[:, :, None]
    rise = values[:, None, :] - values[:, :, None]
    slope = torch.where(later, rise / distance, torch.inf)
    # The farthest row of equal slopes, so that no corner lies on a side.
    least = slope.amin(2, keepdim=True)
    best = later & (slope <= least + _ROUNDING * 1e-3)
    farthest = torch.where(best, row, -1).amax(2)
    return torch.where(farthest >= 0, farthest, row)


def _marked(target: Tensor, flags: Tensor) -> Tensor:
    """Return flags at the targets of flagged rows."""
    marks = torch.zeros(flags.shape, dtype=torch.int64, device=flags.device)
    return marks.scatter_reduce(1, target, flags.long(), "amax") > 0
