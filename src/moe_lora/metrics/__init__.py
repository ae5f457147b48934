"""Metrics for object removal: tensor functions per sample and region.

Images are `(B, 3, H, W)` in [0, 1], masks `(B, 1, H, W)` in [0, 1] with 1 = remove. Every metric
returns `MetricValues`: one value and one pixel count per sample. Samples without the region, such
as those with an empty mask, are excluded from means. Metrics are computed in float64, without
gradient. The package depends neither on PEFT nor on diffusers.

- `measure` computes all metrics in all regions.
- `psnr`, `ssim` and `lpips` compare images in a region, `seam_error` across the mask's edge.
- `regions` returns the regions: whole, inside, outside, boundary, effect.
- `mask_sizes` and `MetricValues.mean_by` group samples; `join` concatenates batches.

Example:
    >>> import torch
    >>> mask = torch.zeros(2, 1, 16, 16)
    >>> mask[0, :, 4:12, 4:12] = 1
    >>> target = torch.full((2, 3, 16, 16), 0.5)
    >>> found = measure(target + 0.125, target, mask)
    >>> found["ssim/whole"].values
    tensor([0.9756, 0.9756], dtype=torch.float64)
    >>> found["seam_error"].tolist()
    [0.0, None]
"""

from __future__ import annotations

from moe_lora.metrics.image import psnr, ssim, ssim_map
from moe_lora.metrics.metric_values import MetricValues, join
from moe_lora.metrics.perceptual import load_lpips, lpips
from moe_lora.metrics.regions import mask_sizes, regions
from moe_lora.metrics.removal import measure
from moe_lora.metrics.seam import seam_error

__all__ = [
    "MetricValues",
    "join",
    "load_lpips",
    "lpips",
    "mask_sizes",
    "measure",
    "psnr",
    "regions",
    "seam_error",
    "ssim",
    "ssim_map",
]
