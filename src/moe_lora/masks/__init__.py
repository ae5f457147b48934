"""Mask analysis, regions and readers: pure tensor functions.

A mask is `(B, 1, H, W)`, floating point in [0, 1], in pixel space, and 1 means *remove*. Soft
values are allowed. Everything is batched and computed in float32; a batch gives the same results
as its samples one by one. Nothing here knows of PEFT, of diffusers or of the tuner.

- `analyze` describes masks by numbers, a `MaskInfo`; `MaskInfo.features` stacks those that a
  router reads. `extract_mask_info_from_batch` does it for a training batch.
- `boundary_band`, `to_latent` and `to_tokens` say where a mask lies.
- `from_flux_fill` and `from_inpainting_unet` read the mask back out of what stock models are fed.
- `composite` pastes a prediction into the source, `keep_source` keeps of the source what the model
  did not change on purpose, and `correct_seam` takes the step along the mask's edge out of either,
  by `harmonic_extension`.
- `augment` draws masks anew as users draw them, too tight and too loose; `augmentation` holds what
  it draws from. `distance_to_mask` measures how far pixels are from a mask.
- `check_mask` is what all of them ask of a mask.

Example:
    >>> import torch
    >>> mask = torch.zeros(1, 1, 64, 64)
    >>> mask[..., 16:48, 16:48] = 1
    >>> analyze(mask).area_ratio.item()
    0.25
"""

from __future__ import annotations

from moe_lora.masks.analysis import analyze
from moe_lora.masks.augmentation import augment
from moe_lora.masks.batch import extract_mask_info_from_batch
from moe_lora.masks.compositing import composite, keep_source
from moe_lora.masks.distance import distance_to_mask
from moe_lora.masks.info import MaskInfo
from moe_lora.masks.laplace import harmonic_extension
from moe_lora.masks.readers import from_flux_fill, from_inpainting_unet
from moe_lora.masks.regions import boundary_band, to_latent, to_tokens
from moe_lora.masks.seam_correction import correct_seam
from moe_lora.masks.validation import check_mask

__all__ = [
    "MaskInfo",
    "analyze",
    "augment",
    "boundary_band",
    "check_mask",
    "composite",
    "correct_seam",
    "distance_to_mask",
    "extract_mask_info_from_batch",
    "from_flux_fill",
    "from_inpainting_unet",
    "harmonic_extension",
    "keep_source",
    "to_latent",
    "to_tokens",
]
