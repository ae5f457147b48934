"""Shape routing weights for the rows and tokens of a layer's input."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TokenStream = Literal["image", "text", "joint", "joint_image_first"]
"""Which tokens a layer sees: the image's, the text's, the text's followed by the image's, or the
image's followed by the text's.
"""

RowLayout = Literal["sample", "folded", "packed"]
"""What the first dimension of a layer's input counts.

- "sample": samples.
- "folded": samples times frames (or other parts), sample by sample.
- "packed": tokens of all samples, in an order that the layer cannot know.
"""


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
            "Leave the layer out with `exclude_modules`."
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
    Where the layer sees the image at another resolution, they are resampled; see `resample`.

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
    size = None if grid is None else level_of(grid, places)
    if grid is not None and size is not None:
        weights = resample(weights, grid, size)
    elif grid is not None or further != 0:
        raise ValueError(
            f"Expected routing weights for the {math.prod(places)} tokens of the layer's input of "
            f"shape {tuple(x.shape)}, but got weights for {tokens} tokens"
            f"{'' if grid is None else f' on a grid of {grid[0]} x {grid[1]}'}."
        )
    return weights.view(weights.shape[0], *places, weights.shape[-1])


def level_of(grid: tuple[int, int], places: tuple[int, ...]) -> tuple[int, int] | None:
    """Find the resolution at which a layer sees an image.

    Models scale both sides by one whole factor: down to `(ceil(rows / f), ceil(columns / f))`, or
    up to `(f · rows, f · columns)`. No two factors give as many tokens on different grids.

    Args:
        grid: `(rows, columns)` of the image.
        places: `(tokens,)` or `(rows, columns)` of the layer's input.

    Returns:
        `(rows, columns)` of the layer's tokens; `None` when no factor gives them.

    Example:
        >>> level_of((5, 8), (12,)), level_of((5, 8), (160,)), level_of((5, 8), (13,))
        ((3, 4), (10, 16), None)
    """
    rows, columns = grid
    tokens, factor = math.prod(places), 1
    size = grid
    while size[0] * size[1] > tokens and factor < max(grid):
        factor += 1
        size = (-(-rows // factor), -(-columns // factor))
    while size[0] * size[1] < tokens and size == (factor * rows, factor * columns):
        factor += 1
        size = (factor * rows, factor * columns)
    return size if places in ((size[0] * size[1],), size) else None


def resample(weights: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Average token weights over the area of each token of another grid over the same image.

    Rows that sum to 1 still do, and the mean over the tokens stays what it is. A row that held one
    expert may hold several.

    Args:
        weights: `(B, rows * columns, E)`, tokens in row-major order.
        grid: `(rows, columns)` of the weights.
        size: `(rows, columns)` to make.

    Returns:
        `(B, size[0] * size[1], E)`; `weights` itself where the grids are the same.

    Example:
        >>> resample(torch.tensor([[[1.0], [0.0], [0.0], [1.0]]]), (1, 4), (1, 2)).flatten()
        tensor([0.5000, 0.5000])
    """
    if size == grid:
        return weights
    rows, columns = (_area_shares(old, new, weights) for old, new in zip(grid, size, strict=True))
    planes = weights.unflatten(1, grid)
    return torch.einsum("ur,brce,vc->buve", rows, planes, columns).flatten(1, 2)


def _area_shares(old: int, new: int, like: Tensor) -> Tensor:
    """Return `(new, old)`, the share of each new cell that each old one covers."""
    # In units of 1 / (old · new) of the side all ends are whole numbers, so that nothing is lost.
    start = torch.arange(new, device=like.device)[:, None] * old
    place = torch.arange(old, device=like.device) * new
    shared = torch.minimum(start + old, place + new) - torch.maximum(start, place)
    return shared.clamp(min=0).to(like.dtype) / old
