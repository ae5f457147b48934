"""What the router sees of the visual tokens, pooled with the mask's help."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lora.masks import boundary_band, to_tokens

FeatureMode = Literal["mask_focused", "boundary_aware", "content_adaptive"]

EMPTY_WEIGHT = 1e-6
"""Token weights that sum to no more than this pool over nothing; all tokens are used instead."""

NOISE_FEATURES = 5
"""The width of `noise_features`."""

TOKEN_MASK_FEATURES = 4
"""The width of `token_mask_features`."""

MASK_BIAS = 2.0
"""Initial attention score that a fully masked token has over an unmasked one (e² = 7.4 times)."""


class MaskAwareFeatureExtractor(nn.Module):
    """Pool visual tokens into one feature vector per sample.

    Every mode is a weighted mean Σ_t w_t h_t over the tokens of the sample, Σ_t w_t = 1:

    - `mask_focused`: w_t is proportional to the share of token t that the mask covers.
    - `boundary_aware`: w_t is proportional to the share of token t that lies in the band along the
      mask's edge (`boundary_band`), half a token wide on each side of it (at least a pixel).
    - `content_adaptive`: w = softmax_t(h_t · q / √D + b · m_t) with a learned query q, a learned
      bias b and the covered share m_t.

    An empty mask has no masked tokens, and an empty or full one no boundary: the mean then runs
    over all tokens of that sample.

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
            ValueError: when `grid_size` is missing or does not give `T` tokens, or when the shapes
                do not agree.
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
            weights = _normalized(covered)
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
                "Expected `grid_size`, the (rows, columns) of the tokens, to be known: without it "
                "the mask cannot be laid over the tokens."
            )
        if grid_size[0] * grid_size[1] != tokens:
            raise ValueError(
                f"Expected `grid_size` to give {tokens} tokens, but got {tuple(grid_size)}."
            )
        return grid_size


def _normalized(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    some = total > EMPTY_WEIGHT
    uniform = torch.full_like(weights, 1 / weights.shape[-1])
    return torch.where(some, weights / torch.where(some, total, 1.0), uniform)


def noise_features(sigma: Tensor) -> Tensor:
    """Describe a noise level by smooth functions of it.

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
    """Tell for every token where it lies relative to the mask.

    The share of the token that the mask covers; the share that lies in the band along the mask's
    edge (`boundary_band`), half a token wide on each side of it (at least a pixel); and the mean
    cover of the 3 x 3 and of the 7 x 7 tokens around it, as far as they are in the image.

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
