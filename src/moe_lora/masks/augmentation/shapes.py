"""Shapes around the object: boxes, ellipses, and boxes with curved sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lora.masks.augmentation.parameters import binary, extent, per_sample, pixel_centers

AROUND_THE_BOX = math.sqrt(2)
"""Scale of the smallest ellipse that contains the box."""


def box(mask: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """Fill the bounding box of each mask.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        margin: pixels added on each side, >= 0; a scalar or `(B,)`.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0.

    Raises:
        TypeError, ValueError: if `mask` is invalid, or `margin` is negative or of another shape.

    Example:
        >>> box(torch.eye(3)[None, None]).mean()
        tensor(1.)
    """
    inside = binary(mask)
    more = per_sample(margin, inside, "margin", 0)
    x, y = pixel_centers(inside)
    x0, y0, x1, y1 = extent(inside)
    filled = (x > x0 - more) & (x < x1 + more) & (y > y0 - more) & (y < y1 + more)
    return filled.float() * _any(inside)


def ellipse(mask: Tensor, scale: float | Tensor = AROUND_THE_BOX) -> Tensor:
    """Fill an axis-aligned ellipse around the center of each mask's bounding box.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        scale: ratio of the ellipse's axes to the box's sides, > 0; a scalar or `(B,)`. An ellipse
            of scale 1 is inscribed; sqrt(2), the default, is the smallest that contains the box.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0.

    Raises:
        TypeError, ValueError: if `mask` is invalid, or `scale` is out of range or of another shape.

    Example:
        >>> mask = torch.zeros(1, 1, 64, 64)
        >>> mask[..., 12:52, 12:52] = 1
        >>> ellipse(mask, 1.0).sum()  # pi * 20² = 1257
        tensor(1264.)
    """
    inside = binary(mask)
    factor = per_sample(scale, inside, "scale", torch.finfo(torch.float32).tiny)
    x, y = pixel_centers(inside)
    x0, y0, x1, y1 = extent(inside)
    across = (2 * x - x0 - x1) / (factor * (x1 - x0).clamp(min=1))
    down = (2 * y - y0 - y1) / (factor * (y1 - y0).clamp(min=1))
    return (across.square() + down.square() <= 1).float() * _any(inside)


def bezier_box(mask: Tensor, bulge: Tensor) -> Tensor:
    """Fill the bounding box of each mask, with Bézier curves as sides.

    offset(t) = 3 (1 - t)² t b_1 + 3 (1 - t) t² b_2, t in [0, 1] along the side

    A side is a cubic Bézier curve between two corners of the box. Its inner control points divide
    the side into thirds and are displaced outwards by b_1 and b_2.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        bulge: `(B, 4, 2)`, b_1 and b_2 of the top, bottom, left and right side in pixels, ordered
            from left to right and from top to bottom; negative values are inside the box.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0.

    Raises:
        TypeError, ValueError: if `mask` is invalid, or `bulge` has another shape.

    Example:
        >>> mask = torch.zeros(1, 1, 64, 64)
        >>> mask[..., 22:42, 22:42] = 1
        >>> bezier_box(mask, torch.zeros(1, 4, 2)).sum()
        tensor(400.)
        >>> bezier_box(mask, torch.full((1, 4, 2), 8.0)).sum()  # 400 + 4 * 20 * 8 / 2 = 720
        tensor(728.)
    """
    inside = binary(mask)
    if bulge.shape != (len(inside), 4, 2):
        raise ValueError(
            f"Expected `bulge` to have shape ({len(inside)}, 4, 2), but got {tuple(bulge.shape)}."
        )
    moved = bulge.to(inside.device, torch.float32).view(-1, 4, 2, 1, 1, 1)
    x, y = pixel_centers(inside)
    x0, y0, x1, y1 = extent(inside)
    along_x = ((x - x0) / (x1 - x0).clamp(min=1)).clamp(0, 1)
    along_y = ((y - y0) / (y1 - y0).clamp(min=1)).clamp(0, 1)
    top, bottom = (_curve(along_x, moved[:, side]) for side in (0, 1))
    left, right = (_curve(along_y, moved[:, side]) for side in (2, 3))
    filled = (y > y0 - top) & (y < y1 + bottom) & (x > x0 - left) & (x < x1 + right)
    return filled.float() * _any(inside)


def _curve(t: Tensor, control: Tensor) -> Tensor:
    first, second = control.unbind(1)
    return 3 * (1 - t) * t * ((1 - t) * first + t * second)


def _any(inside: Tensor) -> Tensor:
    return inside.amax((1, 2, 3), keepdim=True)
