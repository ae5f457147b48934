"""Write an image with what the file it came from held."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from image_io.color_profiles import from_srgb
from image_io.image_files import HAS_HEIF
from image_io.reading import LoadedImage


@dataclass(frozen=True)
class Format:
    """What a file format can hold, and how it is written best."""

    name: str
    modes: tuple[str, ...] = ("RGB", "L")
    alpha: bool = True
    metadata: bool = True
    longest_side: int = 2**16 - 1
    longest_exif: int = 2**32
    settings: dict[str, Any] = field(default_factory=dict)


PNG = Format("PNG")
JPEG = Format(
    "JPEG",
    ("RGB", "L", "CMYK"),
    alpha=False,
    longest_exif=2**16 - 10,
    settings={"quality": 95, "subsampling": 0},
)
# Pillow writes all of the EXIF data to TIFF files without compression only.
TIFF = Format("TIFF", ("RGB", "L", "CMYK", "LAB"))
BMP = Format("BMP", alpha=False, metadata=False)
WEBP = Format("WEBP", ("RGB",), longest_side=2**14 - 1, settings={"lossless": True, "exact": True})
AVIF = Format("AVIF", ("RGB",), settings={"quality": 95, "subsampling": "4:4:4"})
HEIF = Format("HEIF", ("RGB",), settings={"quality": 95, "chroma": 444})

FORMATS = {
    **{".png": PNG, ".jpg": JPEG, ".jpeg": JPEG, ".tif": TIFF, ".tiff": TIFF, ".bmp": BMP},
    **{".webp": WEBP, ".avif": AVIF, ".heic": HEIF, ".heif": HEIF},
}

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "BMP": ".bmp", "WEBP": ".webp"}
SUFFIXES |= {"AVIF": ".avif", "HEIF": ".heic"}


def default_suffix(source: LoadedImage) -> str:
    """Return the suffix for the format of a source, `.png` for one that is not written."""
    return SUFFIXES.get(source.format, ".png")


def check_format(output: Path, source: LoadedImage, exif: bytes | None, *, flatten: bool) -> None:
    """Raise unless the format that a suffix names can hold an image like its source.

    Raises:
        ValueError: when it is unknown, or cannot hold the size, transparency or EXIF data.
    """
    kind = FORMATS.get(output.suffix.lower())
    if kind is None:
        raise ValueError(
            f"Expected --output to end with one of {', '.join(FORMATS)}, but got {output}."
        )
    if kind is HEIF and not HAS_HEIF:
        raise ValueError(f"Expected pillow-heif to write {output}: pip install pillow-heif.")
    if source.alpha is not None and not kind.alpha and not flatten:
        raise ValueError(
            f"Expected --output to be of a format with transparency, which the image has, but got "
            f"{output}. Name a .png, .webp or .tif file, or pass --background to fill it."
        )
    if max(source.rgb.size) > kind.longest_side:
        raise ValueError(
            f"Expected sides of at most {kind.longest_side} pixels in {output}, but the image is "
            f"{source.rgb.width}x{source.rgb.height}. Name a .png or .tif file."
        )
    if exif and kind.metadata and len(exif) > kind.longest_exif:
        raise ValueError(
            f"Expected at most {kind.longest_exif} bytes of EXIF data in {output}, but the image "
            f"has {len(exif)}. Name a .png or .tif file."
        )


def check_output(
    output: Path,
    source: LoadedImage,
    *,
    exif: bytes | None = None,
    overwrite: bool = False,
    flatten: bool = False,
) -> None:
    """Raise unless an image can be written; nothing is written for that.

    Args:
        output: the file to be written.
        source: whose transparency it shall hold.
        exif: to be written with it.
        overwrite: whether the output may exist.
        flatten: whether transparency may be lost.

    Raises:
        FileExistsError: when the output exists, and `overwrite` is off.
        IsADirectoryError, NotADirectoryError, PermissionError: when its place cannot be used.
        ValueError: when its format is unknown, or cannot hold the transparency.
    """
    check_format(output, source, exif, flatten=flatten)
    if output.is_dir():
        raise IsADirectoryError(f"Expected --output to be a file, but {output} is a folder.")
    place = next(parent for parent in output.absolute().parents if parent.exists())
    if not place.is_dir():
        raise NotADirectoryError(f"Expected {place} to be a folder, for --output {output}.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"Expected --output in a folder that can be written to, not {place}.")
    if output.exists() and not overwrite:
        raise FileExistsError(
            f"Expected a new file as --output, but {output} exists. Pass --overwrite to replace it."
        )


def without_background(image: Image.Image, source: LoadedImage) -> Image.Image:
    """Take the background out of half transparent pixels, so that it is not seen twice.

    Args:
        image: mode RGB; its background is that of `source.rgb`.
        source: what it was made of, with transparency.
    """
    shown, laid, bare = (np.array(i, np.float32) for i in (image, source.rgb, source.bare))
    share = np.array(source.alpha, np.float32)[..., None] / 255
    behind = laid - share * bare  # (1 - alpha) * background
    found = np.where(share > 0, (shown - behind) / np.maximum(share, 1 / 255), bare)
    return Image.fromarray(found.round().clip(0, 255).astype(np.uint8))


def in_profile(image: Image.Image, profile: bytes, kind: Format) -> Image.Image | None:
    """Convert an sRGB image to a profile, or return None, with a warning, where that fails."""
    try:
        converted = from_srgb(image, profile)
    except (ImageCms.PyCMSError, ValueError, OSError) as error:
        warnings.warn(f"The image is written as sRGB: {error}.", stacklevel=2)
        return None
    return converted if converted.mode in kind.modes else None


def restore(
    image: Image.Image, source: LoadedImage, kind: Format
) -> tuple[Image.Image, bytes | None]:
    """Return an image as its source is stored: its profile, its transparency, unchanged pixels.

    A profile that the format cannot hold is replaced by sRGB's.

    Args:
        image: mode RGB, sRGB, of the size of `source.rgb`.
        source: what it was made of.
        kind: the format to be written.

    Returns:
        The image, and the profile to be written with it, if any.
    """
    same = (np.array(image) == np.array(source.rgb)).all(2)
    if source.alpha is not None and kind.alpha:
        image = without_background(image, source)
    elif source.alpha is not None:
        same &= np.array(source.alpha) == 255
    before, profile = source.bare, source.icc_profile if kind.metadata else None
    if profile:
        converted = in_profile(image, profile, kind)
        if converted is not None and source.stored is not None:
            image, before = converted, source.stored
        else:
            profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.composite(before, image, Image.fromarray(same))
    if source.alpha is not None and kind.alpha:
        image.putalpha(source.alpha)
    return image, profile


def write_image(
    image: Image.Image, output: Path, source: LoadedImage, exif: bytes | None = None
) -> None:
    """Write an image in the format that its suffix names, with what the source's file held.

    The file appears when it is complete. Formats with loss are written at quality 95 without
    subsampled color, and WebP without loss.

    Args:
        image: mode RGB, sRGB, of the size of `source.rgb`.
        output: the file; its folder is made.
        source: what the image was made of.
        exif: of `read_exif`; not written where the format holds none.
    """
    kind = FORMATS[output.suffix.lower()]
    restored, profile = restore(image, source, kind)
    settings = dict(kind.settings)
    if profile:
        settings["icc_profile"] = profile
    if exif and kind.metadata:
        settings["exif"] = exif
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        restored.save(part, kind.name, **settings)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
