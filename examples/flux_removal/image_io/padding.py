"""Pad an image and its mask alike."""

from __future__ import annotations

import numpy as np
from PIL import Image

MULTIPLE = 16
"""Flux packs 2x2 latents of 8x8 pixels into a token."""


def pad_to_multiple(*images: Image.Image, multiple: int = MULTIPLE) -> list[Image.Image]:
    """Pad an image, its mask and what else belongs to it at the right and the bottom.

    All continue their own edge: what the padding repeats of an object at the edge is masked, too.

    Args:
        images: of any mode, all of one size.
        multiple: both sides become multiples of it.

    Raises:
        ValueError: when sizes differ.
    """
    if len({image.size for image in images}) > 1:
        sizes = ", ".join(f"{image.width}x{image.height}" for image in images)
        raise ValueError(f"Expected `images` to have one size, but got {sizes}.")
    padded = []
    for image in images:
        array = np.array(image)
        sides = [(0, -side % multiple) for side in array.shape[:2]]
        padded.append(Image.fromarray(np.pad(array, [*sides, (0, 0)][: array.ndim], mode="edge")))
    return padded
