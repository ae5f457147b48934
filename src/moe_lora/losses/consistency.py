"""The consistency loss: the picture outside the mask is the wanted one."""

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
    """Weigh pixels by how far they are from what a removed object may have changed.

    t² * (3 - 2 * t) with t = min(distance to the mask / effect_band, 1): 0 in the mask, 1/2 in the
    middle of the band, 1 from its end on, with slope 0 at both ends.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove. Distances are to `mask >= 0.5`.
        effect_band: width of the band, in pixels, an integer >= 0; 0 for a weight of 1 everywhere.

    Returns:
        `(B, 1, H, W)`, float32 in [0, 1], without gradient.

    Raises:
        TypeError, ValueError: for a mask that `moe_lora.masks.check_mask` refuses.
        ValueError: for a width that is not an integer >= 0.

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
    """Match the image outside the mask.

    mean over keep_mask * effect_weight of charbonnier(prediction - target), keep_mask = 1 - mask

    Measure against the target result, not the source: an object's shadow lies outside the mask, and
    a loss against the source forbids removing it. Where there is no better target, or it is
    uncertain about shadows and reflections, an effect band relaxes the loss around the mask, see
    `effect_weight`; what is relaxed is left out of the mean's area, too. A smooth L1 penalty. A
    sample whose mask is full counts as 0 in the batch mean.

    Args:
        prediction: `(B, 3, H, W)`, image in [0, 1].
        target: `(B, 3, H, W)`, the wanted result, image in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        effect_band: pixels around the mask where the loss is relaxed, an integer >= 0; 0 for none.
        reduction: "mean" or "none".

    Returns:
        A scalar for "mean", `(B,)` for "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a mask that `moe_lora.masks.check_mask` refuses.
        ValueError: when shapes do not fit, or `effect_band` is not an integer >= 0.

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
    """Hold the settings of `consistency_loss`.

    Args:
        effect_band: pixels around the mask where the loss is relaxed; 0 for none.
        reduction: "mean" or "none".

    Raises:
        ValueError: `effect_band` is not an integer >= 0.

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
