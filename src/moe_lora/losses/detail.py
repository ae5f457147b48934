"""Detail loss: high frequencies inside the mask."""

from __future__ import annotations

import torch
from kornia.filters import laplacian
from torch import Tensor, nn

from moe_lora.losses.reduction import (
    Reduction,
    charbonnier,
    pixel_difference,
    reduce_batch,
    region_mean,
)


def detail_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the error of high frequencies inside the mask.

    mean over the mask of charbonnier(laplacian(prediction - target)), with the 3x3 Laplacian of
    eight neighbors, normalized to a sum of absolute values of 1.

    The loss ignores errors of constant intensity or constant slope. A sample with an empty mask
    contributes 0 to the batch mean.

    Args:
        prediction: `(B, 3, H, W)`, image in [0, 1]; H, W >= 2.
        target: `(B, 3, H, W)`, image in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        reduction: "mean" or "none".

    Returns:
        A scalar for "mean", `(B,)` for "none"; float32 or wider.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.
        ValueError: if shapes do not match.

    Example:
        >>> mask = torch.zeros(1, 1, 5, 5)
        >>> mask[..., 2, 2] = 1.0
        >>> prediction = mask.expand(1, 3, 5, 5)
        >>> detail_loss(prediction, torch.zeros_like(prediction), mask).round(decimals=4)
        tensor(0.4990)
    """
    difference, mask = pixel_difference(prediction, target, mask)
    with torch.autocast(difference.device.type, enabled=False):
        high = laplacian(difference, kernel_size=3)
    return reduce_batch(region_mean(charbonnier(high), mask), reduction)


class DetailLoss(nn.Module):
    """Module form of `detail_loss`.

    Args:
        reduction: "mean" or "none".

    Example:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> DetailLoss()(image, image, torch.ones(1, 1, 16, 16))
        tensor(0.)
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Compute `detail_loss` with these settings."""
        return detail_loss(prediction, target, mask, reduction=self.reduction)
