"""Convert between the color profile of a file and sRGB."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache

from PIL import Image, ImageCms

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
"""Pillow's modes by the color spaces of profiles."""


@lru_cache(maxsize=16)
def build_transform(
    source: bytes | None, target: bytes | None
) -> tuple[ImageCms.ImageCmsTransform, str, str]:
    """Return the transform between two profiles, `None` for sRGB, and the modes of both.

    Raises:
        ImageCms.PyCMSError, ValueError: when a profile is damaged, or has no such direction.
    """
    profiles, modes = [], []
    for data in (source, target):
        opened = ImageCms.ImageCmsProfile(
            io.BytesIO(data) if data else ImageCms.createProfile("sRGB")
        )
        space = opened.profile.xcolor_space
        if space not in MODES:
            raise ValueError(f"a color profile has the unknown space {space!r}")
        profiles.append(opened)
        modes.append(MODES[space])
    transform = ImageCms.buildTransform(
        profiles[0],
        profiles[1],
        modes[0],
        modes[1],
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    return transform, modes[0], modes[1]


def apply_transform(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    """Return an image in the other profile.

    Raises:
        ImageCms.PyCMSError: for an image of another mode than the transform's.
    """
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only in place is nothing returned
    return converted


def in_mode_of(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to the mode of its profile, without any change of color.

    Raises:
        ValueError: when colors would be lost, or other ones made, as between CMYK and RGB.
    """
    if image.mode == mode:
        return image
    kept = {"L": ("1",), "RGB": ("1", "L", "YCbCr", "HSV")}
    if image.mode not in kept.get(mode, ()):
        raise ValueError(f"a color profile of mode {mode} does not fit pixels of {image.mode}")
    return image.convert(mode)


def to_srgb(
    image: Image.Image, profile: bytes | None, name: str
) -> tuple[Image.Image, Image.Image | None]:
    """Convert an 8-bit image without transparency to sRGB.

    Args:
        image: of mode 1, L, RGB, CMYK, LAB, YCbCr or HSV.
        profile: the file's ICC profile, if any.
        name: of the file, for a warning.

    Returns:
        The image in mode RGB, and what was converted, in the profile's own mode; None for the
        latter when no profile was used. A profile that cannot be used is warned of.
    """
    if profile:
        try:
            transform, mode, _ = build_transform(profile, None)
            stored = in_mode_of(image, mode)
            return apply_transform(stored, transform), stored
        except (ImageCms.PyCMSError, ValueError, OSError) as error:
            warnings.warn(f"The color profile of {name} is ignored: {error}.", stacklevel=2)
    if image.mode == "LAB":
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        return to_srgb(image, lab.tobytes(), name)[0], None
    return image.convert("RGB"), None


def from_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an sRGB image to a profile and its mode.

    Raises:
        ImageCms.PyCMSError, ValueError: when the profile cannot be used for that.
    """
    return apply_transform(image, build_transform(None, profile)[0])
