"""Check the files of samples by their headers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from image_io.image_files import named, read_size
from removal_data.options import DataOptions
from removal_data.sources.samples import Finding, Sample

Size = tuple[int, int]


def read_header(path: Path) -> Size | None:
    """Return the width and height of an image or a mask; None for annotations, which have none.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when its header cannot be read.
    """
    if path.suffix.lower() == ".json":
        with named(path, "a mask"):
            return None
    if path.suffix.lower() != ".npy":
        return read_size(path)
    with named(path, "a mask"):
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        height, width = [side for side in shape if side != 1] if len(shape) > 2 else shape
        return width, height


def check_size(
    sample: Sample, sizes: dict[str, Size | None], reading: DataOptions
) -> list[Finding]:
    """Compare the sizes of the parts of a sample, and their sides with multiples of 16."""
    src = sizes["src"]
    assert src is not None  # an image always has a size
    findings = []
    for part, size in sizes.items():
        scaled = part == "mask" and reading.resize_mask and size != src[::-1]
        scaled |= part == "ref" and reading.resolution is not None
        if size in (src, None) or scaled:
            continue
        text = (
            f"Expected `{part}` of sample {sample.name!r} to be {src[0]}x{src[1]} (width x height "
            f"of {sample.files['src']}), but {sample.files[part]} is {size[0]}x{size[1]}."
        )
        if part == "mask" and size != src[::-1]:
            text += " Pass --resize_mask to scale it."
        findings.append(Finding(sample.name, part, "size", text))
    if reading.resolution is None and (src[0] % 16 or src[1] % 16):
        text = (
            f"Expected the sides of sample {sample.name!r} to be multiples of 16, but "
            f"{sample.files['src']} is {src[0]}x{src[1]} (width x height). Pass "
            "--resolution to scale and crop."
        )
        findings.append(Finding(sample.name, "src", "size", text))
    return findings


def check_headers(
    samples: Iterable[Sample], reading: DataOptions
) -> tuple[dict[str, Size], list[Finding]]:
    """Read the headers of all files.

    Args:
        samples: to check.
        reading: how masks are read.

    Returns:
        The width and height of every upright source that has them, by the name of its sample, and
        what is wrong.
    """
    found: dict[str, Size] = {}
    findings: list[Finding] = []
    for sample in samples:
        sizes: dict[str, Size | None] = {}
        unreadable = []
        for part, path in sample.files.items():
            try:
                sizes[part] = read_header(path)
            except FileNotFoundError as error:
                unreadable.append(Finding(sample.name, part, "missing", str(error)))
            except ValueError as error:
                unreadable.append(Finding(sample.name, part, "unreadable", str(error)))
        size = sizes.get("src")
        if size is not None:
            found[sample.name] = size
        if not unreadable:
            unreadable = check_size(sample, sizes, reading)
        findings += unreadable
    return found, findings
