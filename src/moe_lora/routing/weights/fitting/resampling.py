"""Resampling of token weights to the resolutions of a model's levels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """Resolution of an image, relative to a grid.

    Attributes:
        size: `(rows, columns)`.
        shrink: downsampling factor: a cell covers up to `shrink x shrink` cells of the grid.
        enlarge: upsampling factor: a cell of the grid covers `enlarge x enlarge` cells; 1 when
            `shrink` is more than 1.
    """

    size: tuple[int, int]
    shrink: int = 1
    enlarge: int = 1


def find_level(grid: tuple[int, int], token_shape: tuple[int, ...]) -> Level | None:
    """Find the resolution of a layer's input relative to the image's grid.

    Models halve both sides repeatedly and round up: cell `i` of the level `shrink = 2^k` covers the
    cells `shrink * i` to `shrink * (i + 1) - 1` of the grid, up to its last cell, as a convolution
    of stride 2 and padding 1 does. Upsampled images are a whole multiple of the grid.

    Args:
        grid: `(rows, columns)` of the image.
        token_shape: `(tokens,)` or `(rows, columns)` of the layer's input.

    Returns:
        The level; `None` when no factor matches the number of tokens.

    Example:
        >>> find_level((5, 8), (12,))
        Level(size=(3, 4), shrink=2, enlarge=1)
        >>> find_level((5, 8), (160,)), find_level((5, 8), (13,))
        (Level(size=(10, 16), shrink=1, enlarge=2), None)
    """
    rows, columns = grid
    tokens = math.prod(token_shape)
    for halvings in range(max(rows, columns).bit_length() + 1):
        shrink = 2**halvings
        size = (-(-rows // shrink), -(-columns // shrink))
        if token_shape in ((size[0] * size[1],), size):
            return Level(size, shrink)
    factor = math.isqrt(tokens // (rows * columns))
    size = (factor * rows, factor * columns)
    matches = factor > 0 and token_shape in ((size[0] * size[1],), size)
    return Level(size, 1, factor) if matches else None


def downsample(weights: Tensor, grid: tuple[int, int], factor: int) -> Tensor:
    """Average token weights over blocks of cells; the last blocks may be smaller.

    The sum of a row stays 1. A row with one expert may become a row with several.

    Args:
        weights: `(B, rows * columns, E)`, tokens in row-major order.
        grid: `(rows, columns)` of the weights.
        factor: number of cells along each side of a block.

    Returns:
        `(B, ceil(rows / factor) * ceil(columns / factor), E)`; `weights` itself for factor 1.

    Example:
        >>> downsample(torch.tensor([[[1.0], [0.0], [0.5]]]), (1, 3), 2).flatten()
        tensor([0.5000, 0.5000])
    """
    if factor == 1:
        return weights
    rows, columns = (_averaging_matrix(side, factor, weights) for side in grid)
    planes = weights.unflatten(1, grid)
    return torch.einsum("ur,brce,vc->buve", rows, planes, columns).flatten(1, 2)


def upsample(weights: Tensor, grid: tuple[int, int], factor: int, size: tuple[int, int]) -> Tensor:
    """Repeat token weights over blocks of cells, back to the resolution before `downsample`.

    Args:
        weights: `(B, rows * columns, E)`, tokens in row-major order.
        grid: `(rows, columns)` of the weights.
        factor: number of cells along each side of a block.
        size: `(rows, columns)` of the result, at most `factor` times those of the grid.

    Returns:
        `(B, size[0] * size[1], E)`.

    Example:
        >>> upsample(torch.tensor([[[1.0], [0.5]]]), (1, 2), 2, (1, 3)).flatten()
        tensor([1.0000, 1.0000, 0.5000])
    """
    rows, columns = (torch.arange(side, device=weights.device) // factor for side in size)
    enlarged: Tensor = weights.unflatten(1, grid)[:, rows[:, None], columns]
    return enlarged.flatten(1, 2)


def _averaging_matrix(side: int, factor: int, like: Tensor) -> Tensor:
    """Return `(blocks, side)`, the weight of each cell in its block's mean."""
    block = torch.arange(side, device=like.device) // factor
    member = block == torch.arange(-(-side // factor), device=like.device)[:, None]
    return member.to(like.dtype) / member.sum(1, keepdim=True).to(like.dtype)
