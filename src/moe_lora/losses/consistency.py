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


def consistency_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Match the image outside the mask.

    mean over keep_mask = 1 - mask of charbonnier(prediction - target)

    Measure against the target result, not the source: an object's shadow lies outside the mask, and
    a loss against the source forbids removing it. A smooth L1 penalty. A sample whose mask is full
    counts as 0 in the batch mean.

    Args:
        prediction: `(B, 3, H, W)`, image in [0, 1].
        target: `(B, 3, H, W)`, the wanted result, image in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        reduction: "mean" or "none".

    Returns:
        A scalar for "mean", `(B,)` for "none"; float32 or wider.

    Raises:
        TypeError, ValueError: for a mask that `moe_lora.masks.check_mask` refuses.
        ValueError: when shapes do not fit.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[[1.0, 0.0, 0.0]]]])
        >>> prediction = torch.tensor([[[[9.0, 0.5, 0.0]]]]).expand(1, 3, 1, 3)
        >>> consistency_loss(prediction, torch.zeros(1, 3, 1, 3), mask).round(decimals=4)
        tensor(0.2495)
    """
    difference, mask = pixel_difference(prediction, target, mask)
    return reduce_batch(region_mean(charbonnier(difference), 1 - mask), reduction)


class ConsistencyLoss(nn.Module):
    """Hold the settings of `consistency_loss`.

    Args:
        reduction: "mean" or "none".

    Example:
        >>> import torch
        >>> image = torch.rand(1, 3, 16, 16)
        >>> ConsistencyLoss()(image, image, torch.zeros(1, 1, 16, 16))
        tensor(0.)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Compute `consistency_loss` with these settings."""
        return consistency_loss(prediction, target, mask, reduction=self.reduction)
