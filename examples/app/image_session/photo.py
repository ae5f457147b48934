"""Read an uploaded photograph, and write a result as the photograph was stored."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from image_io.image_files import read_size
from image_io.mask_reading import mask_from_alpha
from image_io.mask_values import Mask
from image_io.metadata import read_exif
from image_io.options import ReadingOptions
from image_io.reading import LoadedImage, read_image
from image_io.writing import check_output, default_suffix, write_image


@dataclass(frozen=True)
class Photo:
    """A photograph of one visitor.

    Attributes:
        name: the file's name without its suffix.
        file_name: the file's name, by which COCO annotations find it.
        loaded: colors, transparency, profile and format.
        exif: the metadata, for an upright image.
        holes: `(H, W)`, True where the photograph is transparent; `None` for an opaque one.
    """

    name: str
    file_name: str
    loaded: LoadedImage
    exif: bytes | None
    holes: Mask | None

    @property
    def image(self) -> Image.Image:
        """The pixels in mode RGB, upright, sRGB."""
        return self.loaded.rgb

    def source_for(self, mask: Mask) -> LoadedImage:
        """Return what a removal under a mask starts from.

        Transparent pixels that the mask covers are filled, so that the result is opaque then.
        """
        if self.holes is None or not (mask & self.holes).any():
            return self.loaded
        return dataclasses.replace(self.loaded, rgb=self.loaded.bare, alpha=None)


def open_photo(path: Path, *, most_megapixels: float) -> Photo:
    """Read a photograph of any format that `image_io` reads.

    Args:
        path: of the file.
        most_megapixels: larger ones are refused before they are decoded.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read, or is too large.
    """
    width, height = read_size(path)
    if width * height > most_megapixels * 1e6:
        raise ValueError(
            f"Expected a photograph of at most {most_megapixels:g} megapixels, but {path.name} has "
            f"{width}x{height} pixels. Scale it down first, or start the app with a larger "
            "--most_megapixels."
        )
    loaded = read_image(path)
    holes = None if loaded.alpha is None else mask_from_alpha(loaded, ReadingOptions())
    return Photo(path.stem, path.name, loaded, read_exif(path), holes)


def write_result(result: Image.Image, photo: Photo, mask: Mask, folder: Path) -> Path:
    """Write a result in the photograph's format, with its profile, transparency and metadata.

    Args:
        result: mode RGB, of the photograph's size.
        photo: the source.
        mask: `(H, W)`, True where something was removed.
        folder: receives the file.

    Returns:
        The file, named after the photograph.

    Raises:
        ValueError: when the format cannot hold the image.
    """
    source = photo.source_for(mask)
    output = folder / f"{photo.name}_removed{default_suffix(source)}"
    check_output(output, source, exif=photo.exif, overwrite=True)
    write_image(result, output, source, photo.exif)
    return output


def write_mask(mask: Mask, photo: Photo, folder: Path) -> Path:
    """Write a mask as a PNG file that `remove.py` reads; white = remove."""
    output = folder / f"{photo.name}_mask.png"
    Image.fromarray(mask.astype(np.uint8) * 255).save(output)
    return output


def difference(result: Image.Image, source: Image.Image, *, gain: int = 4) -> Image.Image:
    """Return how far two images of one size differ, in mode RGB.

    |result − source| · gain, cut at white.
    """
    changed = np.abs(np.asarray(result, np.int16) - np.asarray(source, np.int16))
    return Image.fromarray((changed * gain).clip(0, 255).astype(np.uint8))
