"""The only place of the app that removes objects, as `remove.py` does."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from PIL import Image

from flux_fill.models import Conditioner
from flux_fill.surroundings import check_surroundings
from object_removal.crops import RemovalSettings, edit_crop


def remove_from_image(
    pipe: Any,
    conditioner: Conditioner,
    image: Image.Image,
    mask: Image.Image,
    *,
    steps: int,
    seed: int,
    outside: str,
) -> Image.Image:
    """Return the image that `remove.py` writes with the same options, without crops.

    The model runs at the size of the image, padded to multiples of 16 pixels.

    Args:
        pipe: a `FluxFillPipeline`, or what calls one.
        conditioner: makes the prompt embeddings.
        image: mode RGB.
        mask: mode L, 0 and 255, of the same size; white = remove.
        steps: of denoising.
        seed: of the noise.
        outside: one of `flux_fill.surroundings.OUTSIDE`.
    """
    args = argparse.Namespace(outside=outside, seam=None, feather=None)
    check_surroundings(args)
    settings = RemovalSettings(
        steps=steps, outside=args.outside, seam=args.seam, feather=args.feather
    )
    size = (image.height, image.width)
    return edit_crop(pipe, conditioner, image, np.array(mask) > 127, settings, size, seed=seed)
