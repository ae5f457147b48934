"""Read an image with its mask and its reference, and check where the outputs go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_io.mask_reading import mask_from_alpha, read_mask
from image_io.metadata import read_exif
from image_io.options import ReadingOptions
from image_io.reading import LoadedImage, read_image
from image_io.writing import check_output, default_suffix
from object_removal.files import Job


@dataclass(frozen=True)
class Inputs:
    """What is read for one image.

    Attributes:
        image: with what its file held.
        mask: `(H, W)`; True = remove.
        exif: of the image; `None` without any.
        ref: the reference, mode RGB; `None` without one.
        outputs: the file to be written for each seed.
    """

    image: LoadedImage
    mask: NDArray[np.bool_]
    exif: bytes | None
    ref: Image.Image | None
    outputs: dict[int, Path]


def read_inputs(job: Job, options: ReadingOptions, *, overwrite: bool) -> Inputs:
    """Read the files of a job, and check its outputs.

    Raises:
        FileNotFoundError, ValueError: when a file cannot be read, or the mask is empty.
        FileExistsError, OSError, ValueError: when an output cannot be written.
    """
    background = options.background or "white"
    loaded, exif = read_image(job.image, background), read_exif(job.image)
    suffix = default_suffix(loaded)
    outputs = {
        seed: path if path.suffix else path.with_suffix(suffix)
        for seed, path in job.outputs.items()
    }
    if job.mask is None:
        try:
            mask = mask_from_alpha(loaded, options)
        except ValueError as error:
            raise ValueError(f"{error} ({job.image})") from error
        # What was transparent is filled, so that the result is opaque.
        loaded = dataclasses.replace(loaded, rgb=loaded.bare, alpha=None)
    else:
        mask = read_mask(job.mask, loaded.rgb.size, options, image=job.image)
    if not mask.any():
        raise ValueError(
            f"Expected something to remove in the mask {job.mask or job.image}, but it is empty. "
            "Pass --invert_mask if black means remove."
        )
    for output in outputs.values():
        check_output(
            output, loaded, exif=exif, overwrite=overwrite, flatten=options.background is not None
        )
    ref = None if job.ref is None else read_image(job.ref, background).rgb
    return Inputs(loaded, mask, exif, ref, outputs)


def read_all(
    jobs: Iterable[Job],
    options: ReadingOptions,
    skipped: list[str],
    *,
    overwrite: bool,
    fail_fast: bool,
) -> Iterator[tuple[Job, Inputs]]:
    """Read the files of jobs, one after another, without those that cannot be used.

    Args:
        jobs: the images to edit.
        options: how files are read.
        skipped: receives why jobs are left out.
        overwrite: whether outputs may exist.
        fail_fast: raise the first error instead.
    """
    for job in jobs:
        try:
            inputs = read_inputs(job, options, overwrite=overwrite)
        except (OSError, ValueError) as error:
            if fail_fast:
                raise
            skipped.append(str(error))
            continue
        yield job, inputs
