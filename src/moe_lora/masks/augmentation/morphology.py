"""Masks that are too loose or too tight."""

from __future__ import annotations

import math

from torch import Tensor

from moe_lora.masks.augmentation.parameters import binary, per_sample
from moe_lora.masks.distance import distance_to_mask


def dilate(mask: Tensor, radius: float | Tensor) -> Tensor:
    """Enlarge masks by a disk.

    1 where a masked pixel is at most `radius` away, between the middles of pixels. It is done by
    distances, since a neighborhood of each pixel, as in `kornia.morphology.dilation`, takes
    (2 * radius + 1)² times the memory and one radius for all.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        radius: pixels, >= 0; a number or `(B,)`.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0.

    Raises:
        TypeError, ValueError: `mask` is no mask, or `radius` is negative or of another shape.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 1, 1, 5)
        >>> mask[..., 1] = 1
        >>> dilate(mask, 2).tolist()
        [[[[1.0, 1.0, 1.0, 1.0, 0.0]]]]
    """
    inside = binary(mask)
    reach = per_sample(radius, inside, "radius", 0)
    return (distance_to_mask(inside, _limit(reach)) <= reach).float()


def erode(mask: Tensor, radius: float | Tensor) -> Tensor:
    """Shrink masks by a disk.

    1 where no pixel outside the mask is at most `radius` away. The border of the image is no edge.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        radius: pixels, >= 0; a number or `(B,)`.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0; empty where the mask is too thin.

    Raises:
        TypeError, ValueError: `mask` is no mask, or `radius` is negative or of another shape.

    Example:
        >>> import torch
        >>> mask = torch.ones(1, 1, 1, 5)
        >>> mask[..., 0] = 0
        >>> erode(mask, 2).tolist()
        [[[[0.0, 0.0, 0.0, 1.0, 1.0]]]]
    """
    inside = binary(mask)
    reach = per_sample(radius, inside, "radius", 0)
    return (distance_to_mask(1 - inside, _limit(reach)) > reach).float()


def _limit(reach: Tensor) -> int:
    """Return a limit that tells `<= reach` from more."""
    return math.floor(reach.max().item()) + 1
