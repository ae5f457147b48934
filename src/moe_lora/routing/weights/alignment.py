"""Shape routing weights for the rows and tokens of a layer's input."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.families import RowLayout, TokenStream


def weights_by_row(weights: Tensor, rows: int, layout: RowLayout = "sample") -> Tensor:
    """Give every row of a layer's input the routing weights of the sample that it belongs to.

    Weights of one sample, `(1, E)`, serve every row of a "folded" or "packed" layer.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        rows: size of the first dimension of the layer's input.
        layout: what that dimension counts.

    Returns:
        `(E,)`, or `(rows, ...)` with the other dimensions of `weights`.

    Raises:
        ValueError: when the rows do not tell whose they are, for token weights in a "folded"
            layer, and when the numbers do not fit.

    Example:
        >>> import torch
        >>> weights_by_row(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 4, "folded").tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    batch = weights.shape[0]
    if weights.ndim == 1 or (weights.ndim == 2 and batch == 1 and layout != "sample"):
        return weights if weights.ndim == 1 else weights[0]
    if layout == "packed":
        raise ValueError(
            "Expected one routing weight per expert, or a batch of one sample, in a layer that "
            f"sees the tokens of all samples in one row, but got weights for {batch} samples. "
            "Give weights of shape (E,), or leave the layer out with `exclude_modules`."
        )
    if layout == "folded" and weights.ndim == 3:
        raise ValueError(
            "Expected routing weights per sample in a layer that sees every frame by itself, but "
            f"got weights per token of shape {tuple(weights.shape)}."
        )
    if rows != batch and (layout == "sample" or rows % batch):
        raise ValueError(
            f"Expected routing weights for the {rows} samples of the layer's input, but got "
            f"weights of shape {tuple(weights.shape)}."
        )
    return weights if rows == batch else weights.repeat_interleave(rows // batch, dim=0)


def align_weights(
    weights: Tensor,
    x: Tensor,
    stream: TokenStream = "image",
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Shape routing weights so that they broadcast against the tokens of a layer's input.

    Sample weights serve every token. Token weights serve the image's tokens; text tokens, and
    inputs without tokens such as those of modulation layers, use the sample's mean over tokens.
    Where the layer sees the image at another resolution, they are resampled; see `level_of`.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        x: `(B, D)`, `(B, T', D)` or `(B, H, W, D)`, the layer's input.
        stream: which tokens `x` holds; it follows from the layer's place in the model.
        grid: `(rows, columns)` of the `T` tokens, where they are an image whose resolution the
            model changes.

    Returns:
        `(E,)`, `(B, E)`, `(B, 1 or T', E)` or `(B, 1 or H, 1 or W, E)`.

    Raises:
        ValueError: when the batch or the tokens do not fit.
    """
    if weights.ndim == 1:
        return weights
    if weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"Expected routing weights for the {x.shape[0]} samples of the layer's input, but got "
            f"weights of shape {tuple(weights.shape)}."
        )
    if weights.ndim == 3:
        if x.ndim > 2 and not (stream == "text" and x.ndim == 3):
            return _by_token(weights, x, stream, grid)
        weights = weights.mean(dim=1)
    return weights.view(weights.shape[0], *[1] * (x.ndim - 2), weights.shape[-1])


def _by_token(
    weights: Tensor, x: Tensor, stream: TokenStream, grid: tuple[int, int] | None
) -> Tensor:
    places, tokens = tuple(x.shape[1:-1]), weights.shape[1]
    further = math.prod(places) - tokens
    if stream in ("joint", "joint_image_first") and x.ndim == 3 and further >= 0:
        text = weights.mean(dim=1, keepdim=True).expand(-1, further, -1)
        return torch.cat([text, weights] if stream == "joint" else [weights, text], dim=1)
    level = None if grid is None else level_of(grid, places)
    if grid is not None and level is not None:
        weights = (
            coarsen(weights, grid, level.shrink)
            if level.enlarge == 1
            else enlarge(weights, grid, level.enlarge, level.size)
        )
    elif grid is not None or further != 0:
        raise ValueError(
            f"Expected routing weights for the {math.prod(places)} tokens of the layer's input of "
            f"shape {tuple(x.shape)}, but got weights for {tokens} tokens"
            f"{'' if grid is None else f' on a grid of {grid[0]} x {grid[1]}'}."
        )
    return weights.view(weights.shape[0], *places, weights.shape[-1])


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
