"""PSNR and SSIM of images, over all pixels or over those of a region."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.metrics.metric_values import Measured
from moe_lora.metrics.validation import check_pair, check_region

MOST_PSNR = 100.0
"""The PSNR in dB of equal images, whose true one is infinite."""

SSIM_RADIUS, SSIM_SIGMA = 5, 1.5
"""The window of Wang et al.: 11 x 11 pixels, Gaussian."""

_C1, _C2 = 0.01**2, 0.03**2


def psnr(result: Tensor, truth: Tensor, region: Tensor | None = None) -> Measured:
    """Measure the peak signal-to-noise ratio in dB, sample by sample.

    -10 · log10(mean over the region and the channels of (result - truth)²), at most 100.

    Args:
        result: `(B, C, H, W)`, in [0, 1].
        truth: the same shape.
        region: `(B, 1, H, W)`, bool; everywhere by default.

    Returns:
        dB, `(B,)`; missing where the region is empty.

    Raises:
        TypeError, ValueError: for images that are none, are outside [0, 1] or do not fit.

    Example:
        >>> psnr(torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8)).values
        tensor([6.0206], dtype=torch.float64)
    """
    first, second = check_pair(result, truth, names=("result", "truth"))
    error = region_average((first - second).square().mean(1, keepdim=True), region)
    ratio = -10 * error.values.clamp_min(10 ** (-MOST_PSNR / 10)).log10()
    return Measured(torch.where(error.present(), ratio, 0), error.pixels)


def ssim(result: Tensor, truth: Tensor, region: Tensor | None = None) -> Measured:
    """Measure the structural similarity, sample by sample: the region's mean of `ssim_map`.

    Args:
        result: `(B, C, H, W)`, in [0, 1].
        truth: the same shape.
        region: `(B, 1, H, W)`, bool; everywhere by default.

    Returns:
        In [-1, 1], 1 where the images are equal, `(B,)`; missing where the region is empty.

    Raises:
        TypeError, ValueError: for images that are none, are outside [0, 1] or do not fit.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to
        structural similarity", 2004, equation 13.

    Example:
        >>> ssim(torch.full((1, 3, 8, 8), 0.5), torch.full((1, 3, 8, 8), 0.25)).values
        tensor([0.8001], dtype=torch.float64)
    """
    return region_average(ssim_map(result, truth), region)


def ssim_map(result: Tensor, truth: Tensor) -> Tensor:
    """Compute the structural similarity around every pixel, averaged over the channels.

    (2·μ₁·μ₂ + c₁)·(2·σ₁₂ + c₂) / ((μ₁² + μ₂² + c₁)·(σ₁² + σ₂² + c₂)), c₁ = 0.01², c₂ = 0.03²

    Means and (co)variances are taken in a Gaussian window of 11 x 11 pixels and σ = 1.5; images are
    mirrored at their border. Pixels up to 5 outside a region so have a say in what is measured in
    it.

    Args:
        result: `(B, C, H, W)`, in [0, 1].
        truth: the same shape.

    Returns:
        `(B, 1, H, W)`, float64, in [-1, 1].

    Raises:
        TypeError, ValueError: for images that are none, are outside [0, 1] or do not fit.

    Source: Wang et al. 2004, equation 13.
    """
    first, second = check_pair(result, truth, names=("result", "truth"))
    parts = (first, second, first * first, second * second, first * second)
    blurred = _blur(torch.cat(parts, dim=1))
    mean_1, mean_2, square_1, square_2, product = blurred.chunk(5, dim=1)
    both = square_1 - mean_1.square() + square_2 - mean_2.square()
    covariance = product - mean_1 * mean_2
    upper = (2 * mean_1 * mean_2 + _C1) * (2 * covariance + _C2)
    lower = (mean_1.square() + mean_2.square() + _C1) * (both + _C2)
    return (upper / lower).mean(1, keepdim=True)


def region_average(values: Tensor, region: Tensor | None) -> Measured:
    """Average a map over a region, sample by sample.

    Args:
        values: `(B, 1, H, W)`, float64.
        region: `(B, 1, H, W)`, bool; everywhere by default.

    Returns:
        `(B,)`; missing where the region is empty.

    Example:
        >>> values = torch.tensor([[[[1.0, 3.0, 8.0]]]], dtype=torch.float64)
        >>> region_average(values, torch.tensor([[[[True, True, False]]]])).mean()
        2.0
    """
    where = check_region(region, values)
    pixels = where.flatten(1).sum(1)
    total = torch.where(where, values, 0).flatten(1).sum(1)
    return Measured(total / pixels.clamp(min=1), pixels)


def _blur(images: Tensor) -> Tensor:
    offsets = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / SSIM_SIGMA).square())
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    for axis in (2, 3):
        padded = images.index_select(axis, _mirrored(images.shape[axis], images.device))
        shape = (channels, 1, -1, 1) if axis == 2 else (channels, 1, 1, -1)
        weight = kernel.expand(channels, -1).reshape(shape)
        images = F.conv2d(padded, weight, groups=channels)
    return images


def _mirrored(size: int, device: torch.device) -> Tensor:
    """Index a side with `SSIM_RADIUS` more pixels at both ends: d c b a | a b c d | d c b a."""
    place = torch.arange(-SSIM_RADIUS, size + SSIM_RADIUS, device=device) % (2 * size)
    return torch.minimum(place, 2 * size - 1 - place)
