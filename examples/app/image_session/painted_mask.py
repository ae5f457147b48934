"""Masks that are shown on a photograph and changed with brushes of two colors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from image_io.mask_reading import read_mask
from image_io.mask_values import Mask, near
from image_io.options import ReadingOptions
from image_session.photo import Photo

REMOVE, KEEP = (213, 94, 0), (0, 114, 178)
"""Colors of the brushes: what is painted with the first is removed, with the second kept."""

OPACITY = 0.7
"""Of brushes and of the shown mask; the photograph shines through."""

PAINTED = 64
"""Alpha from which a pixel counts as painted; browsers round colors and edges."""

LONGEST_SIDE = 2048
"""Larger photographs are shown and painted on at this size."""


def editor_image(image: Image.Image) -> Image.Image:
    """Return an image at the size at which it is shown and painted on."""
    scale = LONGEST_SIDE / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def with_mask(image: Image.Image, mask: Mask) -> Image.Image:
    """Return an image, at the size of the editor, on which a mask is shown.

    Args:
        image: mode RGB.
        mask: `(H, W)`, True = remove.
    """
    shown = editor_image(image)
    alpha = resized(mask, shown.size).astype(np.uint8) * round(255 * OPACITY)
    return Image.composite(Image.new("RGB", shown.size, REMOVE), shown, Image.fromarray(alpha))


def repainted(mask: Mask, layers: Sequence[Image.Image]) -> Mask:
    """Return a mask with what was painted on it.

    Args:
        mask: `(H, W)`, True = remove.
        layers: mode RGBA, of any size; the color that is nearer counts.

    Example:
        >>> layer = Image.new("RGBA", (3, 1))
        >>> layer.putpixel((0, 0), (*KEEP, 178))
        >>> layer.putpixel((2, 0), (*REMOVE, 178))
        >>> repainted(np.array([[True, True, False]]), [layer]).tolist()
        [[False, True, True]]
    """
    height, width = mask.shape
    for layer in layers:
        values = np.array(layer.convert("RGBA"), np.int32)
        far, near_to = (np.square(values[..., :3] - color).sum(2) for color in (REMOVE, KEEP))
        painted, kept = values[..., 3] >= PAINTED, near_to < far
        mask = mask | resized(painted & ~kept, (width, height))
        mask = mask & ~resized(painted & kept, (width, height))
    return mask


def resized(mask: Mask, size: tuple[int, int]) -> Mask:
    """Scale a mask, with smooth edges; one that has the size comes back as it is."""
    if mask.shape == (size[1], size[0]):
        return mask
    shades = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    cut: Mask = np.array(shades) >= 128
    return cut


def empty_mask(photo: Photo) -> Mask:
    """Return a mask of a photograph that covers nothing, `(H, W)`."""
    return np.zeros((photo.image.height, photo.image.width), dtype=bool)


def grown(mask: Mask, pixels: int) -> Mask:
    """Return a mask with all pixels that are at most so many pixels away.

    Raises:
        ValueError: for less than 1 pixel.
    """
    if pixels < 1:
        raise ValueError(f"Expected to grow by at least 1 pixel, but got {pixels}.")
    return near(mask, pixels) if mask.any() else mask


def mask_from_file(path: Path, photo: Photo) -> Mask:
    """Read a mask file of any kind that `image_io` reads, at the photograph's size.

    A mask of another size is scaled, and gray areas are cut at half.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read, or its sides are swapped.
    """
    options = ReadingOptions(resize_mask=True, threshold_mask=True)
    return read_mask(path, photo.image.size, options, image=Path(photo.file_name))
