"""The convex hull of a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks.augmentation.parameters import binary

_ROUNDING = 1e-6


def convex_hull(mask: Tensor) -> Tensor:
    """Fill the convex hull of each mask.

    The pixels whose middles are in the convex hull of the middles of the masked pixels, exactly.
    In each row only the first and the last masked pixel count; the hull's sides are the convex
    envelope of the first ones and the concave one of the last ones. Takes memory for
    B * H² numbers.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.

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
    place = torch.arange(width, device=inside.device, dtype=torch.float64)
    occupied = inside.any(2)
    first = torch.where(inside, place, torch.inf).amin(2)
    last = torch.where(inside, place, -torch.inf).amax(2)
    left = _convex_envelope(first, occupied)[..., None]
    right = -_convex_envelope(-last, occupied)[..., None]
    filled = (place >= left - _ROUNDING) & (place <= right + _ROUNDING)
    return filled.float()[:, None]


def _convex_envelope(values: Tensor, known: Tensor) -> Tensor:
    """Return the greatest convex function of the row that is nowhere above the known values.

    Args:
        values: `(B, H)`, float64, one a row.
        known: `(B, H)`, bool, where they count.

    Returns:
        `(B, H)`, float64; infinite in rows before the first and after the last known one.
    """
    height = values.shape[1]
    row = torch.arange(height, device=values.device)
    after = _next_corner(values, known)
    start = known.int().argmax(1, keepdim=True)
    corner = torch.zeros_like(known).scatter_(1, start, known.gather(1, start))
    jump = after
    for _ in range(height.bit_length()):  # every round doubles the corners that are found
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
    """Return for every row the later known one to which the line is least steep, or itself."""
    height = values.shape[1]
    row = torch.arange(height, device=values.device)
    distance = (row[None, :] - row[:, None]).clamp(min=1)
    later = (row[None, :] > row[:, None]) & known[:, None, :] & known[:, :, None]
    rise = values[:, None, :] - values[:, :, None]
    slope = torch.where(later, rise / distance, torch.inf)
    # Among equal slopes the farthest, so that no corner lies on a side.
    least = slope.amin(2, keepdim=True)
    best = later & (slope <= least + _ROUNDING * 1e-3)
    farthest = torch.where(best, row, -1).amax(2)
    return torch.where(farthest >= 0, farthest, row)


def _marked(target: Tensor, flags: Tensor) -> Tensor:
    """Mark the targets of the flagged rows."""
    marks = torch.zeros(flags.shape, dtype=torch.int64, device=flags.device)
    return marks.scatter_reduce(1, target, flags.long(), "amax") > 0
