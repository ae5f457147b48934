"""Area and extent of a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def area_ratio(mask: Tensor) -> Tensor:
    """Compute the masked share of the image.

    Args:
        mask: `(B, 1, H, W)`, float32, in [0, 1]; 1 = remove.

    Returns:
        `(B,)`, float32 in [0, 1].

    Example:
        >>> area_ratio(torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]]]))
        tensor([0.3750])
    """
    return mask.mean((1, 2, 3)).clamp(0, 1)


def bounding_box(row_peak: Tensor, column_peak: Tensor, threshold: float) -> Tensor:
    """Compute the bounding box of all values of at least `threshold`.

    Args:
        row_peak: `(B, H)`, maximum of each row.
        column_peak: `(B, W)`, maximum of each column.
        threshold: smallest value inside the box.

    Returns:
        `(B, 4)`, int64, `(x0, y0, x1, y1)` in pixels, end exclusive; zeros if there is no such
        value.

    Example:
        >>> values = torch.zeros(1, 5, 7)
        >>> values[:, 1:3, 2:6] = 1
        >>> bounding_box(values.amax(2), values.amax(1), 0.5).tolist()
        [[2, 1, 6, 3]]
    """
    x0, x1 = _extent(column_peak >= threshold)
    y0, y1 = _extent(row_peak >= threshold)
    return torch.stack([x0, y0, x1, y1], dim=1)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    size = occupied.shape[1]
    position = torch.arange(size, device=occupied.device)
    first = torch.where(occupied, position, size).amin(1)
    end = torch.where(occupied, position + 1, 0).amax(1)
    return torch.minimum(first, end), end
