"""Consistency loss: the image outside the mask."""

from __future__ import annotations

from torch import Tensor, nn

from moe_lora.losses.reduction import (
    Reduction,
    charbonnier,
    pixel_difference,
    reduce_batch,
    region_mean,
)
from moe_lora.masks import check_mask
from moe_lora.masks.distance import distance_to_mask
from moe_lora.masks.validation import check_integer


def effect_weight(mask: Tensor, effect_band: int) -> Tensor:
    """Compute pixel weights that increase with the distance to the mask.

    t² * (3 - 2 * t), t = min(distance to the mask / effect_band, 1): 0 in the mask, 1/2 in the
    middle of the band, 1 beyond it, with slope 0 at both ends.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove. Distances are to `mask >= 0.5`.
        effect_band: width of the band in pixels, an integer >= 0; 0 for a weight of 1 everywhere.

    Returns:
        `(B, 1, H, W)`, float32 in [0, 1], without gradient.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.
        ValueError: if `effect_band` is not an integer >= 0.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[[1.0, 0.0, 0.0, 0.0, 0.0]]]])
        >>> effect_weight(mask, 4)
        tensor([[[[0.0000, 0.1562, 0.5000, 0.8438, 1.0000]]]])
    """
    check_integer(effect_band, "effect_band", 0)
    if effect_band == 0:
        return check_mask(mask).detach().new_ones(()).expand(mask.shape)
    t = distance_to_mask(mask, effect_band) / effect_band
    return t.square() * (3 - 2 * t)


def consistency_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    effect_band: int = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the error of the image outside the mask.

    mean over keep_mask * effect_weight of charbonnier(prediction - target), keep_mask = 1 - mask

    The target is the image without the object, not the source: a loss against the source would
    penalize the removal of shadows outside the mask. If the target is unreliable around the mask,
    `effect_band` reduces the weight there, both in the error and in the area of the mean; see
    `effect_weight`. A sample with a full mask contributes 0 to the batch mean.

    Args:
        prediction: `(B, 3, H, W)`, image in [0, 1].
        target: `(B, 3, H, W)`, image in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        effect_band: width in pixels of the band with reduced weight around the mask, an
            integer >= 0; 0 for none.
        reduction: "mean" or "none".

    Returns:
        A scalar for "mean", `(B,)` for "none"; float32 or wider.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.
        ValueError: if shapes do not match, or `effect_band` is not an integer >= 0.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> prediction = torch.tensor([[[[9.0, 0.5, 0.0]]]]).expand(1, 3, 1, 3)
        >>> consistency_loss(prediction, torch.zeros(1, 3, 1, 3), mask).round(decimals=4)
        tensor(0.2495)
    """
    difference, mask = pixel_difference(prediction, target, mask)
    region = (1 - mask) * effect_weight(mask, effect_band)
    return reduce_batch(region_mean(charbonnier(difference), region), reduction)


class ConsistencyLoss(nn.Module):
    """Module form of `consistency_loss`.

    Args:
        effect_band: width in pixels of the band with reduced weight around the mask; 0 for none.
        reduction: "mean" or "none".

    Raises:
        ValueError: if `effect_band` is not an integer >= 0.

    Example:
        >>> import torch
        >>> image = torch.rand(1, 3, 16, 16)
        >>> ConsistencyLoss()(image, image, torch.zeros(1, 1, 16, 16))
        tensor(0.)
    """

    def __init__(self, *, effect_band: int = 0, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_integer(effect_band, "effect_band", 0)
        self.effect_band = effect_band
        self.reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Compute `consistency_loss` with these settings."""
        return consistency_loss(
            prediction,
            target,
            mask,
            effect_band=self.effect_band,
            reduction=self.reduction,
        )
