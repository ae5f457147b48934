"""References for Redux without the object: the masked source, or a part beside the mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CELLS = 64
"""Cells along the longer side, of which a cut-out is made."""


def masked_source(src: Tensor, mask: Tensor) -> Tensor:
    """Return an image `(3, H, W)` in [0, 1], gray under the mask `(1, H, W)`."""
    return torch.where(mask > 0, 0.5, src)


def largest_free_box(taken: Tensor) -> tuple[int, int, int, int] | None:
    """Return top, left, bottom and right of the largest rectangle without any taken cell.

    Args:
        taken: `(H, W)`, bool.

    Returns:
        None when all cells are taken.

    Example:
        >>> largest_free_box(torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]]).bool())
        (0, 0, 2, 2)
    """
    best, found = 0, None
    heights = [0] * taken.shape[1]
    for row, cells in enumerate(taken.tolist()):
        heights = [0 if cell else height + 1 for cell, height in zip(cells, heights, strict=True)]
        for left in range(len(heights)):
            lowest = row + 1
            for right in range(left, len(heights)):
                lowest = min(lowest, heights[right])
                if lowest == 0:
                    break
                area = lowest * (right - left + 1)
                if area > best:
                    best, found = area, (row + 1 - lowest, left, row + 1, right + 1)
    return found


def cutout(src: Tensor, mask: Tensor) -> Tensor:
    """Return about the largest part of an image without the mask, scaled to the image's size.

    Args:
        src: `(3, H, W)`, in [0, 1].
        mask: `(1, H, W)`, in [0, 1]; 1 = remove.

    Returns:
        `(3, H, W)`; the masked source where the mask leaves nothing.
    """
    cell = -(-max(src.shape[-2:]) // CELLS)
    taken = F.max_pool2d((mask[None] > 0).float(), cell, ceil_mode=True)[0, 0] > 0
    box = largest_free_box(taken)
    if box is None:
        return masked_source(src, mask)
    top, left, bottom, right = (cell * side for side in box)
    part = src[:, top:bottom, left:right][None]
    size = (src.shape[-2], src.shape[-1])
    scaled: Tensor = F.interpolate(part, size, mode="bilinear", antialias=True, align_corners=False)
    return scaled[0].clamp(0, 1)


REFERENCES = {"masked_source": masked_source, "cutout": cutout}
