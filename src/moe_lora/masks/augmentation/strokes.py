"""Brush strokes over masks."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks.augmentation.parameters import binary, per_sample, pixel_centers


def strokes(mask: Tensor, picks: Tensor, radius: float | Tensor) -> Tensor:
    """Add a brush stroke through selected pixels of each mask.

    The stroke contains the pixels at a distance of at most `radius` from the polyline through the
    selected pixels. A pick selects pixel number floor(pick * N) of the N masked pixels, counted row
    by row.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        picks: `(B, P)`, in [0, 1), P >= 1.
        radius: radius of the brush in pixels, >= 0; a scalar or `(B,)`.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0, the union of mask and stroke.

    Raises:
        TypeError, ValueError: if `mask` is invalid, or `picks` or `radius` is out of range or has
            another shape.

    Example:
        >>> corners = torch.zeros(1, 1, 5, 5)
        >>> corners[..., 0, 0] = corners[..., 4, 4] = 1
        >>> strokes(corners, torch.tensor([[0.0, 0.9]]), 0.5).sum()
        tensor(5.)
    """
    inside = binary(mask)
    reach = per_sample(radius, inside, "radius", 0)
    given = torch.as_tensor(picks, device=inside.device)
    if given.ndim != 2 or len(given) != len(inside) or given.shape[1] < 1:
        raise ValueError(
            f"Expected `picks` to have shape ({len(inside)}, P), but got {tuple(given.shape)}."
        )
    if not bool(((given >= 0) & (given < 1)).all()):
        raise ValueError(
            "Expected `picks` to have values in [0, 1), but got values from "
            f"{given.min().item():g} to {given.max().item():g}."
        )
    columns, rows = _selected_pixels(inside, given)
    x, y = pixel_centers(inside)
    result = inside
    ends = range(max(given.shape[1] - 1, 1))
    for start in ends:
        end = min(start + 1, given.shape[1] - 1)
        distance = _squared_distance(
            (x, y), (columns[:, start], rows[:, start]), (columns[:, end], rows[:, end])
        )
        result = torch.maximum(result, (distance <= reach.square()).float())
    return result * inside.amax((1, 2, 3), keepdim=True)


def _selected_pixels(inside: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pixel_centers of the picked pixels, `(B, P, 1, 1, 1)` each."""
    width = inside.shape[3]
    counted = inside.flatten(1).long().cumsum(1)
    number = (picks.double() * counted[:, -1:]).long() + 1
    index = torch.searchsorted(counted, number).clamp(max=counted.shape[1] - 1)
    positions = index[..., None, None, None]
    return positions % width + 0.5, positions // width + 0.5


def _squared_distance(
    points: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the squared distance of all pixels to the segment between two points."""
    (x, y), (x0, y0) = points, start
    across, down = end[0] - x0, end[1] - y0
    length = (across.square() + down.square()).clamp(min=1)
    share = (((x - x0) * across + (y - y0) * down) / length).clamp(0, 1)
    return (x - x0 - share * across).square() + (y - y0 - share * down).square()
