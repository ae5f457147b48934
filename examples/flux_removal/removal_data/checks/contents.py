"""Check the pixels of samples: masks, and whether the images of a triplet belong together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from image_io.image_files import read_size
from image_io.mask_reading import read_mask
from image_io.options import ReadingOptions
from image_io.reading import read_image
from moe_lora import metrics
from removal_data.checks.alignment import Array, estimate_shift, overlap
from removal_data.cropping import crop_window, mask_box, share_outside
from removal_data.sources.samples import Finding, Kind, Sample

SIDE = 512
"""Images are compared at this longest side in pixels."""

SAME = 4 / 255
"""Mean change below which two images are the same, up to compression."""

CLEAR = 6 / 255
"""Mean change outside the mask from which its cause is searched."""

INVERTED = 4
"""The change outside an inverted mask is so many times the change inside."""

ALIGNED = 0.6
"""A shift is reported when it reduces the difference to this share."""

SAME_SCENE = 0.5
"""Least correlation outside the mask of two images of one scene."""

LARGEST_EFFECT = 0.25
"""Largest plausible share of the pixels outside the mask with effects of the object."""


@dataclass(frozen=True)
class Content:
    """The images of a sample, reduced to `SIDE` pixels at most.

    Attributes:
        src: `(H, W, 3)`, in [0, 1].
        result: `(H, W, 3)`, in [0, 1].
        mask: `(H, W)`, bool.
        ref: `(H, W, 3)`; None where the sample has none of the source's size.
        area: share of the mask, before the reduction.
        scale: pixels of the file per pixel of the reduced image.
    """

    src: Array
    result: Array
    mask: NDArray[np.bool_]
    ref: Array | None
    area: float
    scale: float


def reduce(image: Image.Image, side: int) -> Array:
    """Return an image as float32 in [0, 1], with a longest side of `side` pixels at most."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def read_content(
    sample: Sample, reading: ReadingOptions, *, side: int = SIDE
) -> tuple[Content | None, list[Finding]]:
    """Read all files of a sample.

    Returns:
        The reduced images, or None with the errors of the files that cannot be read.
    """
    found: dict[str, Array] = {}
    findings: list[Finding] = []
    area, size = 0.0, (1, 1)
    for part, path in sample.files.items():
        try:
            if part == "mask":
                size = read_size(sample.files["src"])
                mask = read_mask(path, size, reading, image=sample.files["src"])
                area = float(mask.mean())
                found[part] = reduce(Image.fromarray(mask.astype(np.uint8) * 255), side)
            else:
                found[part] = reduce(read_image(path, reading.background or "white").rgb, side)
        except (ValueError, FileNotFoundError) as error:
            findings.append(Finding(sample.name, part, "unreadable", str(error)))
    if findings:
        return None, findings
    scale = max(1.0, max(size) / side)
    ref = found.get("ref")
    ref = None if ref is None or ref.shape != found["src"].shape else ref
    return Content(found["src"], found["result"], found["mask"] > 0, ref, area, scale), []


def check_mask(content: Content, change: Array) -> str | None:
    """Return what is wrong with the mask, judged by where the images differ.

    Args:
        content: of the sample.
        change: `(H, W)`, mean absolute difference of source and target over the channels.
    """
    if content.area == 0:
        return "The mask is empty. Pass --invert_mask if black means remove."
    if content.mask.all():
        return "The mask covers the whole image."
    inside, outside = float(change[content.mask].mean()), float(change[~content.mask].mean())
    if outside > CLEAR and outside > INVERTED * inside:
        return (
            f"Source and target differ outside the mask, which covers {content.area:.0%} of the "
            "image: it is probably inverted (--invert_mask), or of another sample."
        )
    return None


def check_alignment(content: Content, change: Array) -> str | None:
    """Return whether the target is shifted against the source, or shows another scene."""
    outside = ~content.mask
    if float(change[outside].mean()) < CLEAR:
        return None
    gray = [image.mean(2) for image in (content.src, content.result)]
    shift = estimate_shift(gray[0], gray[1])
    if shift != (0, 0):
        first, second = overlap(gray[0], gray[1], shift)
        kept = np.logical_and(*overlap(outside, outside, shift))
        before = float(np.abs(gray[0] - gray[1])[outside].mean())
        if kept.mean() > 0.1 and float(np.abs(first - second)[kept].mean()) < ALIGNED * before:
            rows, columns = (round(content.scale * offset) for offset in shift)
            return (
                f"The target is shifted against the source by about {columns} pixels to the right "
                f"and {rows} down."
            )
    values = [image[outside] for image in gray]
    if min(float(value.std()) for value in values) > CLEAR:
        correlation = float(np.corrcoef(*values)[0, 1])
        if correlation < SAME_SCENE:
            return (
                f"The target shows another scene than the source: their correlation outside the "
                f"mask is {correlation:.2f}."
            )
    return None


def check_effect(content: Content) -> str | None:
    """Return whether the target differs from the source in too much of what the mask leaves."""
    tensors = [
        torch.from_numpy(image).permute(2, 0, 1)[None] for image in (content.src, content.result)
    ]
    mask = torch.from_numpy(content.mask)[None, None].float()
    found = metrics.regions(mask, *tensors)
    share = float(found["effect"].sum() / found["outside"].sum())
    if share <= LARGEST_EFFECT:
        return None
    return (
        f"The target differs from the source in {share:.0%} of the image outside the mask, more "
        "than shadows and reflections explain: colors, exposure or compression differ."
    )


def check_content(sample: Sample, content: Content) -> list[Finding]:
    """Return the warnings about a sample: one about its mask, or one about its pair of images."""

    def warn(part: str, kind: Kind, text: str) -> list[Finding]:
        return [Finding(sample.name, part, kind, text, error=False)]

    change = np.abs(content.src - content.result).mean(2)
    if text := check_mask(content, change):
        return warn("mask", "mask", text)
    if float(change[content.mask].mean()) < SAME:
        return warn("result", "pair", "The target equals the source inside the mask.")
    if content.ref is not None:
        shown = float(np.abs(content.src - content.ref)[content.mask].mean())
        if shown < SAME:
            text = "The reference shows the object: it equals the source inside the mask."
            return warn("ref", "pair", text)
    if text := check_alignment(content, change) or check_effect(content):
        return warn("result", "pair", text)
    return []


def check_crop(
    sample: Sample, content: Content, bucket: tuple[int, int], context: float | None
) -> list[Finding]:
    """Return a warning when the crop of a bucket cuts off a part of the mask."""
    size = content.mask.shape[::-1]
    scaled = (round(bucket[0] / content.scale), round(bucket[1] / content.scale))
    window = crop_window(size, scaled, mask_box(content.mask), context=context)
    share = share_outside(content.mask, window)
    if share < 0.005:
        return []
    text = f"The crop to {bucket[0]}x{bucket[1]} cuts off {share:.1%} of the mask."
    return [Finding(sample.name, "mask", "mask", text, error=False)]
