"""Boundary band of a mask, and its share of latent pixels and tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.validation import check_integer, check_mask, check_size, mark_checked


def boundary_band(mask: Tensor, width: int) -> Tensor:
    """Compute the band of pixels on both sides of a mask's edge.

    band = dilate(m, width) - erode(m, width), m = [mask >= 0.5]

    The structuring element is a square of side `2 * width + 1`: the band contains the pixels at a
    Chebyshev distance of up to `width` from the other side of the edge. The border of the image is
    not an edge. Empty and full masks have no band.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        width: width of the band on each side of the edge in pixels, an integer >= 1.

    Returns:
        `(B, 1, H, W)`, float32, 0.0 or 1.0, without gradient.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `check_mask`.
        ValueError: if `width` is not an integer >= 1.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 1, 1, 8)
        >>> mask[..., 4:] = 1
        >>> boundary_band(mask, 1)[0, 0].tolist()
        [[0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
    """
    check_integer(width, "width", 1)
    inside = (check_mask(mask).detach() >= 0.5).float()
    eroded = 1 - _dilate(1 - inside, width)
    return mark_checked(_dilate(inside, width) - eroded)


def to_latent(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Average a mask over the area of each latent pixel.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        size: `(h, w)` of the latents.

    Returns:
        `(B, 1, h, w)`, float32 in [0, 1]. If `h` divides `H` and `w` divides `W`, the mean equals
        that of the mask; else cells overlap by up to a pixel (adaptive average pooling).

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `check_mask`.
        ValueError: if `size` is not two integers >= 1.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 1, 4, 8)
        >>> mask[..., 2:6] = 1
        >>> to_latent(mask, (1, 2)).tolist()
        [[[[0.5, 0.5]]]]
    """
    return F.adaptive_avg_pool2d(check_mask(mask), check_size(size, "size"))


def to_tokens(mask: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Average a mask over the area of each token.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        grid_size: `(rows, columns)` of the token grid; for FLUX `(H // 16, W // 16)`.

    Returns:
        `(B, rows * columns)`, float32 in [0, 1], row by row, in the order of packed FLUX latents.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `check_mask`.
        ValueError: if `grid_size` is not two integers >= 1.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 1, 32, 32)
        >>> mask[..., :16, 16:] = 1
        >>> to_tokens(mask, (2, 2)).tolist()
        [[0.0, 1.0, 0.0, 0.0]]
    """
    rows, columns = check_size(grid_size, "grid_size")
    return F.adaptive_avg_pool2d(check_mask(mask), (rows, columns)).flatten(1)


def _dilate(inside: Tensor, width: int) -> Tensor:
    side = 2 * width + 1
    rows_done = F.max_pool2d(inside, (side, 1), stride=1, padding=(width, 0))
    return F.max_pool2d(rows_done, (1, side), stride=1, padding=(0, width))
