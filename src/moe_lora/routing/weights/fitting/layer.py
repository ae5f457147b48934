"""Step 3: from the routing weights of a call to the shape of one layer's gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lora.families import RowLayout, TokenStream
from moe_lora.routing.weights.fitting.resampling import downsample, find_level, upsample


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
        rows: the meaning of the first dimension of `x`.
        stream: the token stream of `x`.
        grid: `(rows, columns)` of the `T` tokens, if the model may resample them.

    Returns:
        The weights as from `align_weights`.

    Raises:
        ValueError: as `repeat_for_rows` and `align_weights`.
    """
    weights = repeat_for_rows(weights.to(x.device), x.shape[0], rows)
    return align_weights(weights, x, stream, grid)


def repeat_for_rows(weights: Tensor, rows: int, layout: RowLayout = "sample") -> Tensor:
    """Repeat the weights of each sample for its rows in a layer's input.

    Weights of one sample, `(1, E)`, apply to every row of a "folded" or "packed" layer.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        rows: size of the first dimension of the layer's input.
        layout: the meaning of that dimension.

    Returns:
        `(E,)`, or `(rows, ...)` with the other dimensions of `weights`.

    Raises:
        ValueError: for several samples in a "packed" layer, for token weights in a "folded" layer,
            and when `rows` is not a multiple of the batch.

    Example:
        >>> import torch
        >>> repeat_for_rows(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 4, "folded").tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    batch = weights.shape[0]
    if weights.ndim == 1 or (weights.ndim == 2 and batch == 1 and layout != "sample"):
        return weights if weights.ndim == 1 else weights[0]
    if layout == "packed":
        raise ValueError(
            "Expected one routing weight per expert, or a batch of one sample, in a layer with the "
            f"tokens of all samples in one row, but got weights for {batch} samples. Pass weights "
            "of shape (E,), or exclude the layer with `exclude_modules`."
        )
    if layout == "folded" and weights.ndim == 3:
        raise ValueError(
            "Expected routing weights per sample in a layer with one row per frame, but got "
            f"weights per token of shape {tuple(weights.shape)}."
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
    """Reshape routing weights so that they broadcast against the tokens of a layer's input.

    Sample weights apply to every token. Token weights apply to the image tokens; text tokens, and
    inputs without tokens such as those of modulation layers, use the sample's mean over tokens.
    For a layer at another resolution, token weights are resampled; see `find_level`.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        x: `(B, D)`, `(B, T', D)` or `(B, H, W, D)`, the layer's input.
        stream: the token stream of `x`, known from the layer's path in the model.
        grid: `(rows, columns)` of the `T` tokens, if they are an image that the model may resample.

    Returns:
        `(E,)`, `(B, E)`, `(B, 1 or T', E)` or `(B, 1 or H, 1 or W, E)`.

    Raises:
        ValueError: when the batch or the number of tokens does not match.
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
            return _align_token_weights(weights, x, stream, grid)
        weights = weights.mean(dim=1)
    return weights.view(weights.shape[0], *[1] * (x.ndim - 2), weights.shape[-1])


def _align_token_weights(
    weights: Tensor, x: Tensor, stream: TokenStream, grid: tuple[int, int] | None
) -> Tensor:
    token_shape, tokens = tuple(x.shape[1:-1]), weights.shape[1]
    extra_tokens = math.prod(token_shape) - tokens
    if stream in ("joint", "joint_image_first") and x.ndim == 3 and extra_tokens >= 0:
        text = weights.mean(dim=1, keepdim=True).expand(-1, extra_tokens, -1)
        return torch.cat([text, weights] if stream == "joint" else [weights, text], dim=1)
    level = None if grid is None else find_level(grid, token_shape)
    if grid is not None and level is not None:
        weights = (
            downsample(weights, grid, level.shrink)
            if level.enlarge == 1
            else upsample(weights, grid, level.enlarge, level.size)
        )
    elif grid is not None or extra_tokens != 0:
        raise ValueError(
            f"Expected routing weights for the {math.prod(token_shape)} tokens of the layer's "
            f"input of shape {tuple(x.shape)}, but got weights for {tokens} tokens"
            f"{'' if grid is None else f' on a grid of {grid[0]} x {grid[1]}'}."
        )
    return weights.view(weights.shape[0], *token_shape, weights.shape[-1])
