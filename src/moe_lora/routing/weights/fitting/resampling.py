"""Token weights at the resolutions of a model's levels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """A resolution of an image, relative to a grid.

    Attributes:
        size: `(rows, columns)`.
        shrink: a cell covers up to `shrink x shrink` cells of the grid.
        enlarge: a cell of the grid covers `enlarge x enlarge` cells; 1 if `shrink` is more.
    """

    size: tuple[int, int]
    shrink: int = 1
    enlarge: int = 1


def level_of(grid: tuple[int, int], places: tuple[int, ...]) -> Level | None:
    """Find the resolution at which a layer sees an image.

    Models halve both sides again and again, and round up: cell `i` of the level `shrink = 2^k`
    covers the cells `shrink * i` to `shrink * (i + 1) - 1` of the grid, as far as there are any.
    This is what a convolution of stride 2 and padding 1 leaves, and what the upsampling to the
    size before it undoes. Enlarged images have a whole multiple of both sides.

    Args:
        grid: `(rows, columns)` of the image.
        places: `(tokens,)` or `(rows, columns)` of the layer's input.

    Returns:
        The level; None when no factor gives these tokens.

    Example:
        >>> level_of((5, 8), (12,))
        Level(size=(3, 4), shrink=2, enlarge=1)
        >>> level_of((5, 8), (160,)), level_of((5, 8), (13,))
        (Level(size=(10, 16), shrink=1, enlarge=2), None)
    """
    rows, columns = grid
    tokens = math.prod(places)
    for halvings in range(max(rows, columns).bit_length() + 1):
        shrink = 2**halvings
        size = (-(-rows // shrink), -(-columns // shrink))
        if places in ((size[0] * size[1],), size):
            return Level(size, shrink)
    factor = math.isqrt(tokens // (rows * columns))
    size = (factor * rows, factor * columns)
    return Level(size, 1, factor) if factor and places in ((size[0] * size[1],), size) else None


def coarsen(weights: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Average token weights over blocks of cells; the last blocks may be smaller.

    Rows that sum to 1 still do. A row that held one expert may hold several.

    Args:
        weights: `(B, rows * columns, E)`, tokens in row-major order.
        grid: `(rows, columns)` of the weights.
        factor: number of cells along each side of a block.

    Returns:
        `(B, ceil(rows / factor) * ceil(columns / factor), E)`; `weights` itself for the factor 1.

    Example:
        >>> coarsen(torch.tensor([[[1.0], [0.0], [0.5]]]), (1, 3), 2).flatten()
        tensor([0.5000, 0.5000])
    """
    if factor == 1:
        return weights
    rows, columns = (_block_means(side, factor, weights) for side in grid)
    planes = weights.unflatten(1, grid)
    return torch.einsum("ur,brce,vc->buve", rows, planes, columns).flatten(1, 2)


def enlarge(weights: Tensor, grid: tuple[int, int], factor: int, size: tuple[int, int]) -> Tensor:
    """Repeat token weights over blocks of cells: undo the resolution of `coarsen`.

    Args:
        weights: `(B, rows * columns, E)`, tokens in row-major order.
        grid: `(rows, columns)` of the weights.
        factor: number of cells along each side of a block.
        size: `(rows, columns)` of the result, at most `factor` times those of the grid.

    Returns:
        `(B, size[0] * size[1], E)`.

    Example:
        >>> enlarge(torch.tensor([[[1.0], [0.5]]]), (1, 2), 2, (1, 3)).flatten()
        tensor([1.0000, 1.0000, 0.5000])
    """
    rows, columns = (torch.arange(side, device=weights.device) // factor for side in size)
    enlarged: Tensor = weights.unflatten(1, grid)[:, rows[:, None], columns]
    return enlarged.flatten(1, 2)


def _block_means(side: int, factor: int, like: Tensor) -> Tensor:
    """Return `(blocks, side)`, the share of each cell in its block's mean."""
    block = torch.arange(side, device=like.device) // factor
    member = block == torch.arange(-(-side // factor), device=like.device)[:, None]
    return member.to(like.dtype) / member.sum(1, keepdim=True).to(like.dtype)
