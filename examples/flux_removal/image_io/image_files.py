"""Readers of image files, with errors that name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from image_io.tiff_reading import read_color_tiff

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HAS_HEIF = False
else:
    register_heif_opener()
    HAS_HEIF = True

HEIF_SUFFIXES = (".heic", ".heif")

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".bmp"),
    *HEIF_SUFFIXES,
)

BITS_PER_SAMPLE, PLANAR_CONFIGURATION = 258, 284
"""Tags of TIFF files."""

LOSSY_FORMATS = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
"""Formats that may have changed values a little; WebP files do not say whether they did."""


@dataclass(frozen=True)
class ImageFile:
    """What an image file stores.

    Attributes:
        pixels: upright, in the file's own mode; of several images in a file the first.
        format: Pillow's name of the file's format.
        tags: those of a TIFF file; of other files none.
    """

    pixels: Image.Image
    format: str
    tags: dict[int, Any]


def explain(error: Exception, path: Path) -> str:
    """Return why a file cannot be read, and what to do about it."""
    if isinstance(error, UnidentifiedImageError):
        if path.suffix.lower() in HEIF_SUFFIXES and not HAS_HEIF:
            return "HEIC files need the package pillow-heif: pip install pillow-heif."
        return "it is empty, damaged or of an unknown format."
    if isinstance(error, Image.DecompressionBombError):
        return f"it is too large. {error} Scale it down first."
    text = str(error) or type(error).__name__
    if "MAX_TEXT_CHUNK" in text or "text chunk" in text.lower():
        return f"it holds too much text: {text}. Save it again without its metadata."
    return text if text.endswith(".") else f"{text}."


@contextlib.contextmanager
def named(path: Path, kind: str = "an image") -> Iterator[None]:
    """Turn what goes wrong within into an error that names the file.

    Decoders raise errors of any type for damaged files, so that none can be singled out.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for all else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file {path} with {kind}, but there is none.")
    try:
        yield
    except Exception as error:  # decoders raise any type for a damaged file
        raise ValueError(
            f"Expected {path} to be {kind}, but {path.name} cannot be read: {explain(error, path)}"
        ) from error


def load(path: Path) -> ImageFile:
    """Read an image file and turn it upright, by the orientation in its EXIF or XMP data."""
    try:
        with Image.open(path) as opened:
            tags = dict(getattr(opened, "tag_v2", {}))
            if not misread(tags):
                return ImageFile(ImageOps.exif_transpose(opened), opened.format or "", tags)
    except UnidentifiedImageError:
        if path.suffix.lower() not in (".tif", ".tiff"):
            raise
    return ImageFile(read_color_tiff(path), "TIFF", {})


def misread(tags: dict[int, Any]) -> bool:
    """Return whether a TIFF file has planes of more than 8 bits, which Pillow misreads."""
    return tags.get(PLANAR_CONFIGURATION) == 2 and max(tags.get(BITS_PER_SAMPLE, (8,))) > 8


def late_metadata(path: Path) -> bool:
    """Return whether a PNG file has metadata after its pixels; Pillow decodes all to read it."""
    after_pixels = False
    with path.open("rb") as file:
        file.seek(8)
        while len(start := file.read(8)) == 8:
            after_pixels |= start[4:] == b"IDAT"
            if after_pixels and start[4:] in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            file.seek(int.from_bytes(start[:4], "big") + 4, os.SEEK_CUR)
    return False


def read_size(path: Path) -> tuple[int, int]:
    """Read the width and height of an upright image file from its header.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read.
    """
    with named(path):
        try:
            with Image.open(path) as opened:
                decode = opened.format != "PNG" or late_metadata(path)
                exif = opened.getexif() if decode else Image.Image.getexif(opened)
                turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
                # Pillow turns TIFF files by itself, and has done so with their size.
                width, height = opened.size
                return (height, width) if turned and opened.format != "TIFF" else (width, height)
        except UnidentifiedImageError:
            return load(path).pixels.size
