"""Masks: analysis, regions, augmentation, compositing and extraction from model inputs.

A mask is `(B, 1, H, W)`, floating point in [0, 1], in pixel space; 1 means *remove*. Soft values
are allowed. All functions are batched and compute in float32; samples of a batch are independent.
The package depends neither on PEFT nor on diffusers.

- `analyze` computes the properties of masks, a `MaskInfo`, with `MaskInfo.features` for routers;
  `extract_mask_info_from_batch` analyzes a training batch.
- `boundary_band`, `to_latent` and `to_tokens` convert a mask to bands, latents and tokens.
- `from_flux_fill` and `from_inpainting_unet` extract the mask from the inputs of stock models.
- `composite` pastes a prediction into the source; `keep_source` adds to the source what the model
  changed beyond its own reconstruction; `correct_seam` removes the step along the mask's edge.
- `crop_boxes` finds crops around the parts of a mask at the size of a model; `stitch` puts an
  edited crop back into its image at full resolution.
- `augment` applies random augmentations; `moe_lora.masks.augmentation` contains them.
- `distance_to_mask` computes the distance of pixels to a mask.
- `check_mask` validates a mask.

Example:
    >>> import torch
    >>> mask = torch.zeros(1, 1, 64, 64)
    >>> mask[..., 16:48, 16:48] = 1
    >>> analyze(mask).area_ratio.item()
    0.25
"""

from __future__ import annotations

from moe_lora.masks import augmentation
from moe_lora.masks.analysis import MaskInfo, analyze
from moe_lora.masks.augmentation import augment
from moe_lora.masks.batch import extract_mask_info_from_batch
from moe_lora.masks.compositing import composite, keep_source
from moe_lora.masks.crops import CropBox, crop_boxes
from moe_lora.masks.distance import distance_to_mask
from moe_lora.masks.laplace import harmonic_extension
from moe_lora.masks.readers import from_flux_fill, from_inpainting_unet
from moe_lora.masks.regions import boundary_band, to_latent, to_tokens
from moe_lora.masks.seam_correction import correct_seam
from moe_lora.masks.stitching import stitch
from moe_lora.masks.validation import check_mask

__all__ = [
    "CropBox",
    "MaskInfo",
    "analyze",
    "augment",
    "augmentation",
    "boundary_band",
    "check_mask",
    "composite",
    "correct_seam",
    "crop_boxes",
    "distance_to_mask",
    "extract_mask_info_from_batch",
    "from_flux_fill",
    "from_inpainting_unet",
    "harmonic_extension",
    "keep_source",
    "stitch",
    "to_latent",
    "to_tokens",
]
