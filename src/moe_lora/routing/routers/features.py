"""Router features: mask-aware pooling of visual tokens, noise level, position in the mask."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lora.masks import boundary_band, to_tokens

FeatureMode = Literal["mask_focused", "boundary_aware", "content_adaptive"]

MIN_TOTAL_WEIGHT = 1e-6
"""Smallest sum of pooling weights; below it, the mean runs over all tokens."""

NOISE_FEATURES = 5
"""The width of `noise_features`."""

TOKEN_MASK_FEATURES = 4
"""The width of `token_mask_features`."""

MASK_BIAS = 2.0
"""Initial attention score of a fully masked token relative to an unmasked one (e² = 7.4 times)."""


class MaskAwareFeatureExtractor(nn.Module):
    """Pool visual tokens into one feature vector per sample.

    Every mode is a weighted mean Σ_t w_t h_t over the tokens of the sample, Σ_t w_t = 1:

    - `mask_focused`: w_t is proportional to the masked share of token t.
    - `boundary_aware`: w_t is proportional to the share of token t inside the band along the
      mask's edge (`boundary_band`), half a token wide on each side of it (at least a pixel).
    - `content_adaptive`: w = softmax_t(h_t · q / √D + b · m_t) with a learned query q, a learned
      bias b and the masked share m_t.

    An empty mask has no masked tokens, and an empty or full mask has no boundary: the mean then
    runs over all tokens of the sample.

    Args:
        input_dim: the width `D` of a token.
        mode: "mask_focused", "boundary_aware" or "content_adaptive".

    Raises:
        ValueError: for an unknown mode.

    Example:
        >>> tokens = torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])
        >>> mask = torch.tensor([[[[0.0, 0.0], [1.0, 1.0]]]])
        >>> MaskAwareFeatureExtractor(1)(tokens, mask, grid_size=(2, 2))
        tensor([[3.5000]])
    """

    def __init__(self, input_dim: int, mode: FeatureMode = "mask_focused") -> None:
        super().__init__()
        if mode not in get_args(FeatureMode):
            raise ValueError(
                f"Expected `mode` to be one of {list(get_args(FeatureMode))}, but got {mode!r}."
            )
        self.input_dim = input_dim
        self.mode: FeatureMode = mode
        if mode == "content_adaptive":
            self.query = nn.Parameter(torch.randn(input_dim) * 0.02)
            self.mask_bias = nn.Parameter(torch.tensor(MASK_BIAS))

    @property
    def feature_dim(self) -> int:
        """Return the width of the pooled features."""
        return self.input_dim

    def forward(
        self, hidden_states: Tensor, mask: Tensor, grid_size: tuple[int, int] | None
    ) -> Tensor:
        """Pool the tokens.

        Args:
            hidden_states: `(B, T, D)`, tokens in row-major order.
            mask: `(B, 1, H, W)`, in [0, 1], any resolution; 1 = remove.
            grid_size: `(rows, columns)` with rows · columns = T.

        Returns:
            `(B, feature_dim)`, in the dtype of `hidden_states`.

        Raises:
            ValueError: when `grid_size` is missing or rows · columns is not T, or when the shapes
                do not match.
        """
        rows, columns = self._check(hidden_states, mask, grid_size)
        if self.mode == "boundary_aware":
            mask = boundary_band(mask, max(1, round(mask.shape[-2] / rows / 2)))
        covered = to_tokens(mask, (rows, columns)).to(hidden_states.dtype)
        if self.mode == "content_adaptive":
            query = self.query.to(hidden_states.dtype)
            scores = hidden_states @ query / math.sqrt(self.input_dim)
            weights = (scores + self.mask_bias.to(scores.dtype) * covered).softmax(-1)
        else:
            weights = _normalize_rows(covered)
        return torch.einsum("bt,btd->bd", weights, hidden_states)

    def _check(
        self, hidden_states: Tensor, mask: Tensor, grid_size: tuple[int, int] | None
    ) -> tuple[int, int]:
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != self.input_dim:
            raise ValueError(
                f"Expected `hidden_states` to have shape (B, T, input_dim={self.input_dim}), but "
                f"got {tuple(hidden_states.shape)}."
            )
        batch, tokens, _ = hidden_states.shape
        if mask.ndim != 4 or mask.shape[:2] != (batch, 1):
            raise ValueError(
                f"Expected `mask` to have shape ({batch}, 1, H, W), one per sample, but got "
                f"{tuple(mask.shape)}."
            )
        if grid_size is None:
            raise ValueError(
                "Expected `grid_size`, the (rows, columns) of the tokens, but got None. The mask "
                "cannot be resized to the tokens without it."
            )
        if grid_size[0] * grid_size[1] != tokens:
            raise ValueError(
                f"Expected `grid_size` to have {tokens} tokens, but got {tuple(grid_size)}."
            )
        return grid_size


def _normalize_rows(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    nonempty = total > MIN_TOTAL_WEIGHT
    uniform = torch.full_like(weights, 1 / weights.shape[-1])
    return torch.where(nonempty, weights / torch.where(nonempty, total, 1.0), uniform)


def noise_features(sigma: Tensor) -> Tensor:
    """Compute smooth features of a noise level.

    [σ, sin πσ, cos πσ, sin 2πσ, cos 2πσ]

    Args:
        sigma: `(B,)`, in [0, 1].

    Returns:
        `(B, NOISE_FEATURES)`, in [-1, 1].

    Example:
        >>> noise_features(torch.tensor([0.5])).round(decimals=2) + 0
        tensor([[ 0.5000,  1.0000,  0.0000,  0.0000, -1.0000]])
    """
    turns = math.pi * sigma.unsqueeze(-1) * torch.tensor([1.0, 2.0], device=sigma.device)
    waves = torch.stack([turns.sin(), turns.cos()], dim=-1).flatten(-2)
    return torch.cat([sigma.unsqueeze(-1), waves], dim=-1)


def token_mask_features(mask: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Compute the position of every token relative to the mask.

    The features are the masked share of the token; its share inside the band along the mask's edge
    (`boundary_band`), half a token wide on each side of it (at least a pixel); and the mean masked
    share of the 3 x 3 and of the 7 x 7 tokens around it, inside the image.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], any resolution; 1 = remove.
        grid_size: `(rows, columns)` of the tokens.

    Returns:
        `(B, rows * columns, TOKEN_MASK_FEATURES)`, float32 in [0, 1].

    Example:
        >>> mask = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]])
        >>> token_mask_features(mask, (1, 4))[0, 1].round(decimals=2)
        tensor([0.0000, 1.0000, 0.3300, 0.5000])
    """
    band = boundary_band(mask, max(1, round(mask.shape[-2] / grid_size[0] / 2)))
    covered = to_tokens(mask, grid_size)
    plane = covered.unflatten(1, grid_size).unsqueeze(1)
    near, far = (
        F.avg_pool2d(plane, side, 1, side // 2, count_include_pad=False).flatten(1)
        for side in (3, 7)
    )
    return torch.stack([covered, to_tokens(band, grid_size), near, far], dim=-1)
