"""Metrics of object removal: pure tensor functions, sample by sample and region by region.

Images are `(B, 3, H, W)` in [0, 1], masks `(B, 1, H, W)` in [0, 1] with 1 = remove. Every metric
returns a `Measured`: one value per sample, and the pixels that it was taken over. A sample without
the region (no shadow, an empty mask) is missing; it counts as nothing, never as 0 and never as NaN.
Computed in float64, without gradient. Nothing here knows of PEFT, of diffusers or of the tuner.

- `measure` does everything at once.
- `psnr`, `ssim` and `lpips` compare images in a region, `seam_error` across the mask's edge.
- `regions` marks where: whole, inside, outside, boundary, effect.
- `mask_sizes` and `Measured.mean_by` group samples; `join` puts batches together.

Example:
    >>> import torch
    >>> mask = torch.zeros(2, 1, 16, 16)
    >>> mask[0, :, 4:12, 4:12] = 1
    >>> truth = torch.full((2, 3, 16, 16), 0.5)
    >>> found = measure(truth + 0.125, truth, mask)
    >>> found["ssim/whole"].values
    tensor([0.9756, 0.9756], dtype=torch.float64)
    >>> found["seam_error"].tolist()
    [0.0, None]
"""

from __future__ import annotations

from moe_lora.metrics.image import psnr, ssim, ssim_map
from moe_lora.metrics.metric_values import Measured, join
from moe_lora.metrics.perceptual import load_lpips, lpips
from moe_lora.metrics.regions import mask_sizes, regions
from moe_lora.metrics.removal import measure
from moe_lora.metrics.seam import seam_error

__all__ = [
    "Measured",
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
