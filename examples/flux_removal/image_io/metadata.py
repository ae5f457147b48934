"""Read the EXIF data of a file so that it fits an upright image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from image_io.image_files import named, read_size

Base, IFD = ExifTags.Base, ExifTags.IFD

DESCRIPTIVE = (
    *(Base.ImageDescription, Base.Make, Base.Model, Base.Software, Base.DateTime, Base.Artist),
    *(Base.Copyright, Base.XResolution, Base.YResolution, Base.ResolutionUnit, Base.HostComputer),
    *(Base.Rating, Base.XPTitle, Base.XPComment, Base.XPAuthor, Base.XPKeywords, Base.XPSubject),
)
"""What a TIFF file says of its image; its other tags say how it is stored."""

OFFSETS = (IFD.Interop, 0x0201, 0x0202)
"""Where other blocks lie in the old file; the last two are its thumbnail, with the object in it."""


def read_exif(path: Path) -> bytes | None:
    """Read a file's EXIF data, with the orientation of an upright image; None when there is none.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file or its EXIF data is damaged.
    """
    size = read_size(path)
    with named(path):
        try:
            opened = Image.open(path)
        except UnidentifiedImageError:
            return None  # a TIFF file that Pillow does not know
        with opened:
            exif = opened.getexif()
            blocks: dict[int, dict[int, Any]] = {
                block: exif.get_ifd(block) for block in (IFD.Exif, IFD.GPSInfo)
            }
            told = {t: v for t, v in exif.items() if t not in (*blocks, *OFFSETS)}
            if opened.format == "TIFF":
                told = {tag: value for tag, value in told.items() if tag in DESCRIPTIVE}
        return upright_exif(told, blocks, size)


def upright_exif(
    told: dict[int, Any], blocks: dict[int, dict[int, Any]], size: tuple[int, int]
) -> bytes | None:
    """Return EXIF data with orientation 1 and the size of the upright image."""
    kept = Image.Exif()
    kept.update(told)
    for block, entries in blocks.items():
        kept[block] = {tag: value for tag, value in entries.items() if tag not in OFFSETS}
        if not kept[block]:
            del kept[block]
    shown = kept.get(IFD.Exif, {})
    for tag, side in zip((Base.ExifImageWidth, Base.ExifImageHeight), size, strict=True):
        if tag in shown:
            shown[tag] = side
    if not kept:
        return None
    kept[Base.Orientation] = 1
    return kept.tobytes()
