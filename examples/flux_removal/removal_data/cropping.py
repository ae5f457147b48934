"""Crop images around the mask, and scale them to a bucket."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""


def mask_box(mask: NDArray[np.bool_]) -> Box | None:
    """Return the box around a mask `(H, W)`; None for an empty one."""
    if not mask.any():
        return None
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def crop_window(size: Size, bucket: Size, box: Box | None, *, context: float | None = None) -> Box:
    """Return the part of an image that is scaled to a bucket, around the mask where that fits.

    Args:
        size: width and height of the image.
        bucket: width and height to scale to; the window has its aspect ratio.
        box: of the mask; None for an empty one.
        context: surroundings of the mask on each side, in sides of its box; the window is not
            smaller than the bucket. None for the largest window.

    Returns:
        A box within the image.

    Example:
        >>> crop_window((400, 100), (64, 64), (300, 20, 340, 60))
        (270.0, 0.0, 370.0, 100.0)
        >>> crop_window((400, 100), (64, 64), (300, 20, 340, 60), context=0.5)
        (280.0, 0.0, 360.0, 80.0)
    """
    aspect = bucket[0] / bucket[1]
    width = min(float(size[0]), size[1] * aspect)
    left, top, right, bottom = box or (0.0, 0.0, *map(float, size))
    if context is not None and box is not None:
        grown = 1 + 2 * context
        wanted = max((right - left) * grown, (bottom - top) * grown * aspect, bucket[0])
        width = min(width, wanted)
    height = min(width / aspect, float(size[1]))
    corner = [
        min(max((low + high - side) / 2, 0.0), limit - side)
        for low, high, side, limit in (
            (left, right, width, size[0]),
            (top, bottom, height, size[1]),
        )
    ]
    right, bottom = min(corner[0] + width, size[0]), min(corner[1] + height, size[1])
    return corner[0], corner[1], right, bottom


def scale_image(image: Image.Image, bucket: Size, window: Box) -> Image.Image:
    """Scale a window of an image to a bucket."""
    return image.resize(bucket, Image.Resampling.LANCZOS, box=window)


def scale_mask(mask: NDArray[np.bool_], bucket: Size, window: Box) -> NDArray[np.bool_]:
    """Scale a window of a mask; a pixel is masked if any part of it was."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).convert("F")
    return np.asarray(image.resize(bucket, Image.Resampling.BOX, box=window)) > 0


def share_outside(mask: NDArray[np.bool_], window: Box) -> float:
    """Return the share of a mask `(H, W)` outside a window."""
    if not mask.any():
        return 0.0
    left, top, right, bottom = (round(side) for side in window)
    return 1 - float(mask[top:bottom, left:right].sum() / mask.sum())
