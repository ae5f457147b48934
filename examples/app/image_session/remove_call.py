"""The only place of the app that removes objects, as `remove.py` does."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from PIL import Image

from flux_fill.models import Conditioner
from flux_fill.surroundings import check_surroundings
from moe_lora import masks
from object_removal.crops import RemovalSettings, edit_crop, remove_from_photograph


def remove_from_image(
    pipe: Any,
    conditioner: Conditioner,
    image: Image.Image,
    mask: Image.Image,
    *,
    steps: int,
    seed: int,
    outside: str,
    crop: bool = False,
) -> Image.Image:
    """Return the image that `remove.py` writes with the same options.

    The model runs at the size of the image, padded to multiples of 16 pixels, or on crops.

    Args:
        pipe: a `FluxFillPipeline`, or what calls one.
        conditioner: makes the prompt embeddings.
        image: mode RGB.
        mask: mode L, 0 and 255, of the same size; white = remove.
        steps: of denoising.
        seed: of the noise.
        outside: one of `flux_fill.surroundings.OUTSIDE`.
        crop: run on crops around the mask, of the size that the VAE is made for.
    """
    args = argparse.Namespace(outside=outside, seam=None, feather=None)
    check_surroundings(args)
    settings = RemovalSettings(
        steps=steps, outside=args.outside, seam=args.seam, feather=args.feather
    )
    where = np.array(mask) > 127
    if crop:
        return remove_from_photograph(pipe, conditioner, image, where, settings, seed=seed)
    size = (image.height, image.width)
    return edit_crop(pipe, conditioner, image, where, settings, size, seed=seed)


def count_crops(pipe: Any, mask: Image.Image) -> int:
    """Return on how many crops a removal runs, one after another."""
    where = torch.from_numpy(np.array(mask) > 127)[None, None].float()
    context = RemovalSettings.crop_context
    return len(masks.crop_boxes(where, int(pipe.vae.config.sample_size), context=context)[0])
