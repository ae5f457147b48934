"""Step 3: routing weights of a call, in the shape that one layer multiplies with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lora.families import RowLayout, TokenStream
from moe_lora.routing.weights.fitting.resampling import coarsen, enlarge, level_of


def fit_to_layer(
    weights: Tensor,
    x: Tensor,
    *,
    rows: RowLayout = "sample",
    stream: TokenStream = "image",
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Fit the weights of a call to the rows, then to the tokens of a layer's input.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`, on any device.
        x: `(R, D)`, `(R, T', D)` or `(R, H, W, D)`, the layer's input.
        rows: what the first dimension of `x` counts.
        stream: which tokens `x` has.
        grid: `(rows, columns)` of the `T` tokens, where the model may resample them.

    Returns:
        What `align_weights` returns.

    Raises:
        ValueError: as `weights_by_row` and `align_weights`.
    """
    weights = weights_by_row(weights.to(x.device), x.shape[0], rows)
    return align_weights(weights, x, stream, grid)


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
