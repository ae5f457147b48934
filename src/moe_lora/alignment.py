"""Shape routing weights for the rows and tokens of a layer's input."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

TokenStream = Literal["image", "text", "joint"]
"""Which tokens a layer sees: the image's, the text's, or the text's followed by the image's."""

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


def align_weights(weights: Tensor, x: Tensor, stream: TokenStream = "image") -> Tensor:
    """Shape routing weights so that they broadcast against the tokens of a layer's input.

    Sample weights serve every token. Token weights serve the image's tokens; text tokens, and
    inputs without tokens such as those of modulation layers, use the sample's mean over tokens.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        x: `(B, D)`, `(B, T', D)` or `(B, H, W, D)`, the layer's input.
        stream: which tokens `x` holds; it follows from the layer's place in the model.

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
        tokens = weights.shape[1]
        mean = weights.mean(dim=1)
        if x.ndim == 2 or (stream == "text" and x.ndim == 3):
            weights = mean
        elif stream == "joint" and x.ndim == 3 and x.shape[1] > tokens:
            text = mean.unsqueeze(1).expand(-1, x.shape[1] - tokens, -1)
            return torch.cat([text, weights], dim=1)
        elif math.prod(x.shape[1:-1]) == tokens:
            return weights.view(weights.shape[0], *x.shape[1:-1], weights.shape[-1])
        else:
            raise ValueError(
                f"Expected routing weights for the {math.prod(x.shape[1:-1])} tokens of the "
                f"layer's input of shape {tuple(x.shape)}, but got weights for {tokens} tokens."
            )
    return weights.view(weights.shape[0], *[1] * (x.ndim - 2), weights.shape[-1])
