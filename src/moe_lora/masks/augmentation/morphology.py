"""Dilation and erosion of masks."""

from __future__ import annotations

import math

from torch import Tensor

from moe_lora.masks.augmentation.parameters import binary, per_sample
from moe_lora.masks.distance import distance_to_mask


def dilate(mask: Tensor, radius: float | Tensor) -> Tensor:
    """Dilate masks by a disk.

    out = [distance to the nearest masked pixel <= radius], between pixel centers

    Distances replace the structuring element of `kornia.morphology.dilation`, which needs
    (2 * radius + 1)² times the memory and one radius for the batch.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        radius: radius of the disk in pixels, >= 0; a scalar or `(B,)`.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0.

    Raises:
        TypeError, ValueError: if `mask` is invalid, or `radius` is negative or of another shape.

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
    """Erode masks by a disk.

    out = [distance to the nearest pixel outside the mask > radius], between pixel centers

    The border of the image is not an edge.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        radius: radius of the disk in pixels, >= 0; a scalar or `(B,)`.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0; empty if the mask is too thin.

    Raises:
        TypeError, ValueError: if `mask` is invalid, or `radius` is negative or of another shape.

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
    """Return a distance limit above every radius."""
    return math.floor(reach.max().item()) + 1
