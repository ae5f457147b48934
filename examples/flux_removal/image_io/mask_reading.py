"""Read any file with a mask as 0 and 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from image_io.annotations import read_annotations
from image_io.image_files import IMAGE_SUFFIXES, load, named
from image_io.mask_values import Mask, from_image, from_levels, near, select_label
from image_io.options import ReadingOptions
from image_io.reading import LoadedImage

MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".npy", ".json")


def read_array(path: Path, options: ReadingOptions) -> Mask:
    """Read a mask from a `.npy` file: bool, 0 and 1, labels, or floats in [0, 1].

    Raises:
        ValueError: when it has another shape than `(H, W)`, but for dimensions of 1, or values
            that are no mask.
    """
    values = np.load(path, allow_pickle=False)
    kept = tuple(side for side in values.shape if side != 1)
    if values.ndim > 2 and len(kept) == 2:
        values = values.reshape(kept)
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise ValueError(f"its array is {values.dtype} of shape {values.shape}, not (H, W) numbers")
    if options.mask_label is not None:
        return select_label(values, options.mask_label)
    bits = 8 * values.dtype.itemsize
    return from_levels(values, bits=bits, lossy=False, threshold=options.threshold_mask)


def fit(mask: Mask, size: tuple[int, int], *, resize: bool) -> Mask:
    """Return a mask that has the size of its image.

    Args:
        mask: `(H, W)`.
        size: width and height of the image.
        resize: scale the mask where it has another size, instead of an error.

    Raises:
        ValueError: when sizes differ, or when the sides are swapped, whatever `resize` says.
    """
    width, height = size
    if mask.shape == (height, width):
        return mask
    text = (
        f"Expected the mask to have the image's size, {width}x{height}, but got "
        f"{mask.shape[1]}x{mask.shape[0]}."
    )
    if mask.shape == (width, height):
        raise ValueError(f"{text} The sides are swapped: turn the mask as the image is shown.")
    if not resize:
        raise ValueError(f"{text} Pass --resize_mask to scale it.")
    return np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


def change(mask: Mask, options: ReadingOptions) -> Mask:
    """Invert and grow a mask as the options say, in this order."""
    mask = ~mask if options.invert_mask else mask
    return near(mask, options.grow_mask) if options.grow_mask else mask


def read_mask(
    path: Path, size: tuple[int, int], options: ReadingOptions, *, image: Path | None = None
) -> Mask:
    """Read a mask file of any kind: an image, `.npy`, or COCO annotations in `.json`.

    Args:
        path: of the file.
        size: width and height of the upright image.
        options: how it is read.
        image: the image's file, to find it in a COCO file.

    Returns:
        `(H, W)`, upright, of the image's size; True = remove.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read, when its meaning is ambiguous, or when its size is
            not the image's. The message says why.
    """
    with named(path, "a mask"):
        if path.suffix.lower() == ".npy":
            mask = read_array(path, options)
        elif path.suffix.lower() == ".json":
            name = image.name if image else None
            mask = read_annotations(path, size, image=name, label=options.mask_label)
        else:
            mask = from_image(load(path), options)
    try:
        mask = fit(mask, size, resize=options.resize_mask)
    except ValueError as error:
        raise ValueError(f"{error} ({path})") from error
    return change(mask, options)


def mask_from_alpha(loaded: LoadedImage, options: ReadingOptions) -> Mask:
    """Return the transparent part of an image as its mask.

    Raises:
        ValueError: when the image is opaque.
    """
    if loaded.alpha is None:
        raise ValueError("Expected --mask for an image without transparent pixels, but got none.")
    return change(np.array(loaded.alpha) < 128, options)
