"""PSNR and SSIM of images, over all pixels or in a region."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.metrics.metric_values import MetricValues
from moe_lora.metrics.validation import check_pair, check_region

MOST_PSNR = 100.0
"""The PSNR of equal images in dB, in place of infinity."""

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
"""The Gaussian window of Wang et al., 11 x 11 pixels."""

_C1, _C2 = 0.01**2, 0.03**2


def psnr(prediction: Tensor, target: Tensor, region: Tensor | None = None) -> MetricValues:
    """Compute the peak signal-to-noise ratio in dB per sample.

    -10 · log10(mean over the region and the channels of (prediction - target)²), at most 100.

    Args:
        prediction: `(B, C, H, W)`, image in [0, 1].
        target: `(B, C, H, W)`, image in [0, 1].
        region: `(B, 1, H, W)`, bool; all pixels by default.

    Returns:
        `(B,)`, in dB; samples with an empty region are absent.

    Raises:
        TypeError, ValueError: if an image is invalid, outside [0, 1], or of another shape.

    Example:
        >>> psnr(torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8)).values
        tensor([6.0206], dtype=torch.float64)
    """
    first, second = check_pair(prediction, target, names=("prediction", "target"))
    error = region_average((first - second).square().mean(1, keepdim=True), region)
    ratio = -10 * error.values.clamp_min(10 ** (-MOST_PSNR / 10)).log10()
    return MetricValues(torch.where(error.present(), ratio, 0), error.pixels)


def ssim(prediction: Tensor, target: Tensor, region: Tensor | None = None) -> MetricValues:
    """Compute the structural similarity per sample, the mean of `ssim_map` over a region.

    Args:
        prediction: `(B, C, H, W)`, image in [0, 1].
        target: `(B, C, H, W)`, image in [0, 1].
        region: `(B, 1, H, W)`, bool; all pixels by default.

    Returns:
        `(B,)`, in [-1, 1], 1 for equal images; samples with an empty region are absent.

    Raises:
        TypeError, ValueError: if an image is invalid, outside [0, 1], or of another shape.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to
        structural similarity", 2004, equation 13.

    Example:
        >>> ssim(torch.full((1, 3, 8, 8), 0.5), torch.full((1, 3, 8, 8), 0.25)).values
        tensor([0.8001], dtype=torch.float64)
    """
    return region_average(ssim_map(prediction, target), region)


def ssim_map(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the structural similarity at every pixel, averaged over the channels.

    (2·μ₁·μ₂ + c₁)·(2·σ₁₂ + c₂) / ((μ₁² + μ₂² + c₁)·(σ₁² + σ₂² + c₂)), c₁ = 0.01², c₂ = 0.03²

    Means and covariances are over a Gaussian window of 11 x 11 pixels with σ = 1.5; images are
    mirrored at their border. Pixels up to 5 pixels outside a region therefore influence its mean.

    Args:
        prediction: `(B, C, H, W)`, image in [0, 1].
        target: `(B, C, H, W)`, image in [0, 1].

    Returns:
        `(B, 1, H, W)`, float64, in [-1, 1].

    Raises:
        TypeError, ValueError: if an image is invalid, outside [0, 1], or of another shape.

    Source: Wang et al. 2004, equation 13.
    """
    first, second = check_pair(prediction, target, names=("prediction", "target"))
    parts = (first, second, first * first, second * second, first * second)
    blurred = _blur(torch.cat(parts, dim=1))
    mean_1, mean_2, square_1, square_2, product = blurred.chunk(5, dim=1)
    both = square_1 - mean_1.square() + square_2 - mean_2.square()
    covariance = product - mean_1 * mean_2
    upper = (2 * mean_1 * mean_2 + _C1) * (2 * covariance + _C2)
    lower = (mean_1.square() + mean_2.square() + _C1) * (both + _C2)
    return (upper / lower).mean(1, keepdim=True)


def region_average(values: Tensor, region: Tensor | None) -> MetricValues:
    """Average a map over a region per sample.

    Args:
        values: `(B, 1, H, W)`, float64.
        region: `(B, 1, H, W)`, bool; all pixels by default.

    Returns:
        `(B,)`; samples with an empty region are absent.

    Example:
        >>> values = torch.tensor([[[[1.0, 3.0, 8.0]]]], dtype=torch.float64)
        >>> region_average(values, torch.tensor([[[[True, True, False]]]])).mean()
        2.0
    """
    where = check_region(region, values)
    pixels = where.flatten(1).sum(1)
    total = torch.where(where, values, 0).flatten(1).sum(1)
    return MetricValues(total / pixels.clamp(min=1), pixels)


def _blur(images: Tensor) -> Tensor:
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    for axis in (2, 3):
        padded = images.index_select(axis, _mirrored_indices(images.shape[axis], images.device))
        shape = (channels, 1, -1, 1) if axis == 2 else (channels, 1, 1, -1)
        weight = kernel.expand(channels, -1).reshape(shape)
        images = F.conv2d(padded, weight, groups=channels)
    return images


def _mirrored_indices(size: int, device: torch.device) -> Tensor:
    """Return indices that pad an axis by `SSIM_RADIUS`: d c b a | a b c d | d c b a."""
    index = torch.arange(-SSIM_RADIUS, size + SSIM_RADIUS, device=device) % (2 * size)
    return torch.minimum(index, 2 * size - 1 - index)
