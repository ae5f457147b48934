"""Masks over which someone went with a brush."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks.augmentation.parameters import binary, middles, per_sample


def strokes(mask: Tensor, picks: Tensor, radius: float | Tensor) -> Tensor:
    """Add a brush stroke that goes through given pixels of each mask.

    The stroke is all that is at most `radius` away from the line through the pixels, in their
    order. Pixel number floor(pick * N) of a mask with N pixels, row by row, is meant by a pick.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        picks: `(B, P)`, in [0, 1), P >= 1.
        radius: of the brush, in pixels, >= 0; a number or `(B,)`.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0: the mask and the stroke.

    Raises:
        TypeError, ValueError: `mask` is no mask, `picks` or `radius` is out of range or has another
            shape.

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
        raise ValueError("Expected `picks` to have values in [0, 1), but got others.")
    columns, rows = _picked(inside, given)
    x, y = middles(inside)
    result = inside
    ends = range(max(given.shape[1] - 1, 1))
    for start in ends:
        end = min(start + 1, given.shape[1] - 1)
        distance = _squared_distance(
            (x, y), (columns[:, start], rows[:, start]), (columns[:, end], rows[:, end])
        )
        result = torch.maximum(result, (distance <= reach.square()).float())
    return result * inside.amax((1, 2, 3), keepdim=True)


def _picked(inside: Tensor, picks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the middles of the picked pixels, `(B, P, 1, 1, 1)` each."""
    width = inside.shape[3]
    counted = inside.flatten(1).long().cumsum(1)
    number = (picks.double() * counted[:, -1:]).long() + 1
    index = torch.searchsorted(counted, number).clamp(max=counted.shape[1] - 1)
    places = index[..., None, None, None]
    return places % width + 0.5, places // width + 0.5


def _squared_distance(
    points: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], end: tuple[Tensor, Tensor]
) -> Tensor:
    """Return the squared distance of all pixels from the line between two points."""
    (x, y), (x0, y0) = points, start
    across, down = end[0] - x0, end[1] - y0
    length = (across.square() + down.square()).clamp(min=1)
    share = (((x - x0) * across + (y - y0) * down) / length).clamp(0, 1)
    return (x - x0 - share * across).square() + (y - y0 - share * down).square()
