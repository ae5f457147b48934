"""The only place of the app that calls `remove.py`."""

from __future__ import annotations

import argparse
from typing import Any

from PIL import Image

from flux_fill.models import Conditioner
from flux_fill.surroundings import check_surroundings
from remove import remove_object, surround


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
    """Return the image that `remove.py` writes with the same options.

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
    result = remove_object(pipe, conditioner, image, mask, steps=steps, seed=seed)
    return surround(
        pipe, result, image, mask, outside=args.outside, seam=args.seam, feather=args.feather
    )
