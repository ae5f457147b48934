"""Read TIFF files with color in floats or 32-bit integers, which Pillow does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from image_io.value_ranges import to_eight_bits, value_range


def read_color_tiff(path: Path) -> Image.Image:
    """Read the first page of a TIFF file as upright 8-bit RGB, RGBA or L.

    Raises:
        ValueError: when its pixels are neither gray nor RGB.
    """
    import tifffile  # only few files need it

    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        values = page.asarray()
        tags = {tag.code: tag.value for tag in page.tags}
    if values.ndim == 3 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        values = np.moveaxis(values, 0, -1)
    if values.dtype.kind == "c" or values.shape[2:] not in ((), (3,), (4,)):
        raise ValueError(f"its pixels are {values.dtype} of shape {values.shape}, not gray or RGB")
    scaled = to_eight_bits(values, value_range(values, page.bitspersample))
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        scaled = 255 - scaled
    image = Image.fromarray(np.ascontiguousarray(scaled))
    if profile := tags.get(34675):
        image.info["icc_profile"] = bytes(profile)
    image.getexif()[ExifTags.Base.Orientation] = int(tags.get(274, 1))
    return ImageOps.exif_transpose(image)
