"""Decide which values of a mask file mean *remove*."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from image_io.image_files import LOSSY_FORMATS, ImageFile
from image_io.options import ReadingOptions
from image_io.reading import PHOTOMETRIC, WITH_ALPHA, bits_of, is_deep, raw_values
from image_io.value_ranges import Array, to_eight_bits, value_range
from moe_lora.masks import distance_to_mask

Mask = NDArray[np.bool_]

NOISE = 8
"""How far compression may move black and white."""

EDGE = {False: 2, True: 11}
"""Pixels from an edge that may be gray: by antialiasing, or across a block that JPEG compressed."""

MOST_GRAY = 0.25
"""Share of a mask that edges may make gray; a photograph has edges everywhere."""

FEW = 16
"""More values than this are shades, not labels."""


def listed(values: Array) -> str:
    """Return values for a message, not too many of them."""
    shown = ", ".join(str(value) for value in values[:FEW].tolist())
    return shown if len(values) <= FEW else f"{shown}, ..."


def select_label(values: Array, label: int) -> Mask:
    """Return where a label is.

    Raises:
        ValueError: when it is nowhere.
    """
    chosen: Mask = values == label
    if not chosen.any():
        raise ValueError(f"it has no label {label}; its labels are {listed(np.unique(values))}")
    return chosen


def near(mask: Mask, distance: int) -> Mask:
    """Return which pixels are at most so many pixels from a mask."""
    found = distance_to_mask(torch.from_numpy(mask)[None, None].float(), distance + 1)
    result: Mask = (found <= distance)[0, 0].numpy()
    return result


def cut(values: Array, *, lossy: bool, threshold: bool) -> Mask:
    """Cut gray values at half; only edges may have any, unless a threshold is asked for.

    Args:
        values: uint8, `(H, W)`.
        lossy: whether they were compressed with loss.
        threshold: whether gray areas are cut, too.

    Raises:
        ValueError: for gray areas.
    """
    white: Mask = values >= 128
    gray = (values > NOISE) & (values < 255 - NOISE)
    if threshold or not gray.any():
        return white
    if gray.mean() <= MOST_GRAY:
        gray &= ~(near(white, EDGE[lossy]) & near(~white, EDGE[lossy]))
    share = float(gray.mean())
    if share:
        raise ValueError(
            f"{share:.1%} of it is gray, not at an edge, where black (keep) or white (remove) "
            "is expected. Pass --threshold_mask to cut it at half"
        )
    return white


def from_levels(values: Array, *, bits: int, lossy: bool, threshold: bool) -> Mask:
    """Return where a mask with one channel says *remove*.

    0 and 1 are a mask, and so are 0 and any other value. All else is cut at half of its range.

    Args:
        values: `(H, W)`, integers, floats or bool.
        bits: of a stored value.
        lossy: whether they were compressed with loss.
        threshold: whether gray areas are cut, too.

    Raises:
        ValueError: when it holds gray areas, or labels, of which one has to be named.
    """
    levels = np.unique(values)
    if levels[0] < 0 or not np.isfinite(levels).all():
        raise ValueError(f"its values, from {levels[0]} to {levels[-1]}, are those of no mask")
    if values.dtype.kind != "f" and levels[-1] <= 1:
        return values.astype(bool)
    if len(levels) == 2 and levels[0] == 0 and not lossy:
        return values > 0
    scaled = to_eight_bits(values, value_range(values, bits))
    if values.dtype.kind != "f" and not lossy and len(levels) <= FEW and not threshold:
        white = scaled >= 128
        # Antialiasing makes dark values at edges only.
        dark = (values > 0) & (scaled <= NOISE) & ~near(white, EDGE[False])
        if dark.any() or not white.any():
            raise ValueError(
                f"its values are {listed(levels)}. If these are labels, choose one with "
                "--mask_label; if they are shades, pass --threshold_mask to cut them at half"
            )
    return cut(scaled, lossy=lossy, threshold=threshold)


def from_colors(image: Image.Image, *, lossy: bool) -> Array:
    """Return the gray values of a mask with colors: black and one color are black and white.

    Raises:
        ValueError: for more colors.
    """
    values = np.array(image.convert("RGB"))
    if int((values.max(2) - values.min(2)).max()) <= 2 * NOISE:
        return np.array(image.convert("L"))
    found = np.unique(values.reshape(-1, 3), axis=0)
    if lossy or len(found) != 2 or found[0].any():
        count = "many" if lossy else len(found)
        raise ValueError(
            f"it has colors ({count}), where black (keep) and white (remove) are expected. For a "
            "map of labels, save it with a palette or as gray values, and pass --mask_label"
        )
    return np.asarray(values.any(2), dtype=np.uint8)


def from_palette(image: Image.Image) -> Array:
    """Return the values of a mask with a palette: gray values, or with colors the index.

    Raises:
        ValueError: for colors that are labels, of which one has to be named.
    """
    shown, indices = np.array(image.convert("RGB")), np.array(image)
    if (shown.max(2) == shown.min(2)).all():
        return shown[..., 0]
    found = np.unique(indices)
    if len(found) > 2 or (len(found) == 2 and found[0] != 0):
        raise ValueError(f"its labels are {listed(found)}. Choose one with --mask_label")
    return indices > 0


def from_alpha(image: Image.Image) -> Image.Image | None:
    """Return the alpha channel of a mask, unless it is opaque: what is opaque goes.

    Raises:
        ValueError: when the opaque part is a black and white mask, too.
    """
    if image.mode not in WITH_ALPHA and "transparency" not in image.info:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    opaque = np.array(alpha) >= 128
    if alpha.getextrema()[0] == 255:
        return None
    seen = np.array(image.convert("RGBA").convert("L"))[opaque]
    black, white = seen <= NOISE, seen >= 255 - NOISE
    if black.any() and white.any() and (black | white).all():
        raise ValueError(
            "its alpha channel and its colors are both a mask. Save it without the one that is "
            "not meant"
        )
    return alpha


def from_image(file: ImageFile, options: ReadingOptions) -> Mask:
    """Return where a mask that was read from an image file says *remove*.

    Raises:
        ValueError: when that cannot be told.
    """
    image, lossy = file.pixels, file.format in LOSSY_FORMATS
    threshold = options.threshold_mask
    if options.mask_label is not None:
        if image.mode not in ("P", "L", "1") and not is_deep(image):
            raise ValueError(f"it has colors or transparency (mode {image.mode}), no labels")
        return select_label(raw_values(file), options.mask_label)
    if is_deep(image):
        if file.tags.get(PHOTOMETRIC) == 0:
            raise ValueError("it stores white as 0; save it with black as 0")
        bits = bits_of(file)
        return from_levels(raw_values(file), bits=bits, lossy=lossy, threshold=threshold)
    alpha = from_alpha(image)
    if alpha is not None:
        values = np.array(alpha)
    elif image.mode == "P":
        values = from_palette(image)
    elif image.mode in ("1", "L"):
        values = np.array(image)
    else:
        values = from_colors(image, lossy=lossy)
    return from_levels(values, bits=8, lossy=lossy, threshold=threshold)
