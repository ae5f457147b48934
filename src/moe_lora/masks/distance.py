"""Distance of pixels to a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.validation import check_integer, check_mask


def distance_to_mask(mask: Tensor, limit: int) -> Tensor:
    """Compute the distance of every pixel to the nearest masked pixel.

    min(limit, sqrt(dx² + dy²)) to the nearest pixel with `mask >= 0.5`

    Exact Euclidean distances between pixel centers: 0 in the mask, 1 beside it. The cost is
    proportional to `limit`.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        limit: upper limit of the distance in pixels, an integer >= 1.

    Returns:
        `(B, 1, H, W)`, float32 in [0, limit], without gradient; `limit` everywhere for an empty
        mask.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `check_mask`.
        ValueError: if `limit` is not an integer >= 1.

    Example:
        >>> mask = torch.zeros(1, 1, 2, 4)
        >>> mask[..., 0, 0] = 1
        >>> distance_to_mask(mask, 3)[0, 0]
        tensor([[0.0000, 1.0000, 2.0000, 3.0000],
                [1.0000, 1.4142, 2.2361, 3.0000]])
    """
    check_integer(limit, "limit", 1)
    inside = check_mask(mask).detach() >= 0.5
    width = inside.shape[3]
    position = torch.arange(width, device=inside.device)
    nowhere = width + limit
    before = position - torch.where(inside, position, -nowhere).cummax(dim=3).values
    after = (
        torch.where(inside, position, nowhere + width).flip(3).cummin(dim=3).values.flip(3)
        - position
    )
    along_row = torch.minimum(before, after).clamp(max=limit).float().square()
    # Minimum over rows within the limit of the distance along each row.
    rows = F.pad(along_row, (0, 0, limit, limit), value=float(limit**2))
    nearest = along_row
    for step in range(1, limit):
        above, below = (rows.narrow(2, limit + s, along_row.shape[2]) for s in (-step, step))
        nearest = torch.minimum(nearest, torch.minimum(above, below) + step**2)
    return nearest.clamp(max=limit**2).sqrt()
