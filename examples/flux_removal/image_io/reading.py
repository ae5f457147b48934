"""Read any image file as upright 8-bit sRGB."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

from image_io.color_profiles import to_srgb
from image_io.image_files import BITS_PER_SAMPLE, ImageFile, load, named
from image_io.value_ranges import Array, to_eight_bits, value_range

WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")

PHOTOMETRIC, SAMPLE_FORMAT = 262, 339
LOWEST_VALUES, HIGHEST_VALUES = (340, 280), (341, 281)
"""Tags of TIFF files; where they say which value is black and white, they decide."""


@dataclass(frozen=True)
class LoadedImage:
    """An image as models read it, and as its file stores it.

    Attributes:
        rgb: mode RGB, upright, sRGB; what is transparent lies over the background.
        alpha: mode L, 255 = opaque; None for an opaque image.
        bare: as `rgb`, without the background.
        stored: the colors in the file's profile, upright; None without a profile.
        icc_profile: of `stored`; None without one.
        format: Pillow's name of the file's format.
    """

    rgb: Image.Image
    alpha: Image.Image | None
    bare: Image.Image
    stored: Image.Image | None
    icc_profile: bytes | None
    format: str


def is_deep(image: Image.Image) -> bool:
    """Tell whether an image has one channel of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def raw_values(file: ImageFile) -> Array:
    """Return the numbers of an image with one channel, `(H, W)`, of the type in the file."""
    values = np.array(file.pixels)
    unsigned = file.tags.get(SAMPLE_FORMAT, (1,))[0] == 1
    # Pillow holds unsigned 32-bit integers as signed ones.
    return values.view(np.uint32) if values.dtype == np.int32 and unsigned else values


def bits_of(file: ImageFile) -> int:
    """Return the bits of a value in an image with one channel of more than 8 bits."""
    # Outside of TIFF files, what Pillow reads as 32-bit integers were 16-bit ones.
    bits: int = file.tags.get(BITS_PER_SAMPLE, (16,))[0]
    return bits


def deep_to_eight_bits(file: ImageFile) -> Image.Image:
    """Scale one channel of more than 8 bits to mode L, or LA where one value is transparent."""
    values, tags = raw_values(file), file.tags
    told = [
        next((tags[n] for n in ns if n in tags), None) for ns in (LOWEST_VALUES, HIGHEST_VALUES)
    ]
    low, high = value_range(values, bits_of(file))
    low, high = (
        np.ravel(t)[0] if t is not None else v for t, v in zip(told, (low, high), strict=True)
    )
    if not low < high:
        raise ValueError(f"its tags name {low} as its lowest and {high} as its highest value")
    scaled = to_eight_bits(values, (float(low), float(high)))
    image = Image.fromarray(255 - scaled if tags.get(PHOTOMETRIC) == 0 else scaled)
    clear = file.pixels.info.get("transparency")
    if isinstance(clear, int):
        image.putalpha(Image.fromarray(((values != clear) * 255).astype(np.uint8)))
    return image


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Take an 8-bit image apart into colors and alpha, which is None for an opaque image."""
    if image.mode not in WITH_ALPHA and "transparency" not in image.info:
        return image.convert("RGB") if image.mode == "P" else image, None
    both = image.convert("LA" if image.mode in ("L", "LA", "La") else "RGBA")
    alpha = both.getchannel("A")
    return both.convert(both.mode[:-1]), None if alpha.getextrema()[0] == 255 else alpha


def read_image(path: Path, background: str = "white") -> LoadedImage:
    """Read an image file of any kind.

    It is turned upright, converted to sRGB by its ICC profile, and scaled to 8 bits by the range
    of its values. Of several images in a file the first is read.

    Args:
        path: of the file.
        background: a color that is seen through transparent pixels, as Pillow names it.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read; the message says why.
    """
    with named(path):
        file = load(path)
        profile = file.pixels.info.get("icc_profile")
        image = deep_to_eight_bits(file) if is_deep(file.pixels) else file.pixels
        colors, alpha = split_alpha(image)
        bare, stored = to_srgb(colors, profile, path.name)
        rgb = bare
        if alpha is not None:
            behind = Image.new("RGB", bare.size, ImageColor.getrgb(background)[:3])
            rgb = Image.composite(bare, behind, alpha)
        return LoadedImage(rgb, alpha, bare, stored, profile if stored else None, file.format)
