"""Boundary loss: image gradients along the mask's edge."""

from __future__ import annotations

import torch
from kornia.filters import spatial_gradient
from torch import Tensor, nn

from moe_lora.losses.reduction import (
    Reduction,
    charbonnier,
    pixel_difference,
    reduce_batch,
    region_mean,
)
from moe_lora.masks import boundary_band


def default_band_width(image_height: int, image_width: int) -> int:
    """Choose a boundary-band width in proportion to the image.

    max(2, min(H, W) // 64): 8 pixels at 512, 16 at 1024, 2 at 128 and below.

    Args:
        image_height: height H in pixels.
        image_width: width W in pixels.

    Returns:
        The `width` of `moe_lora.masks.boundary_band` in pixels.

    Example:
        >>> default_band_width(512, 1024)
        8
    """
    return max(2, min(image_height, image_width) // 64)


def boundary_loss(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    width: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the error of image gradients in a band around the mask's edge.

    mean over the band of charbonnier(sobel(prediction - target)), horizontal and vertical; the
    Sobel filter is normalized to intensity per pixel.

    A sample with an empty or full mask has no band and contributes 0 to the batch mean.

    Args:
        prediction: `(B, 3, H, W)`, image in [0, 1].
        target: `(B, 3, H, W)`, image in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        width: width of the band on each side of the edge in pixels, an integer >= 1; `None` for
            `default_band_width(H, W)`.
        reduction: "mean" or "none".

    Returns:
        A scalar for "mean", `(B,)` for "none"; float32 or wider.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.
        ValueError: if shapes do not match, or `width` is not an integer >= 1.

    Example:
        >>> mask = torch.zeros(1, 1, 16, 16)
        >>> mask[..., 4:12, 4:12] = 1.0
        >>> ramp = (0.1 * torch.arange(16.0)).expand(1, 3, 16, 16)
        >>> boundary_loss(ramp, torch.zeros_like(ramp), mask, width=2).round(decimals=4)
        tensor(0.0495)
    """
    difference, mask = pixel_difference(prediction, target, mask)
    if width is None:
        width = default_band_width(mask.shape[-2], mask.shape[-1])
    band = boundary_band(mask, width).to(difference.dtype)
    with torch.autocast(difference.device.type, enabled=False):
        gradients = spatial_gradient(difference, mode="sobel")
    return reduce_batch(region_mean(charbonnier(gradients).flatten(1, 2), band), reduction)


class BoundaryLoss(nn.Module):
    """Module form of `boundary_loss`.

    Args:
        width: width of the band on each side of the edge in pixels, an integer >= 1; `None` for
            `default_band_width(H, W)`.
        reduction: "mean" or "none".

    Example:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> BoundaryLoss(width=2)(image, image, torch.ones(1, 1, 16, 16))
        tensor(0.)
    """

    def __init__(self, *, width: int | None = None, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.width = width
        self.reduction = reduction

    def forward(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Compute `boundary_loss` with these settings."""
        return boundary_loss(prediction, target, mask, width=self.width, reduction=self.reduction)
