"""Find the images to edit, their masks and references, and name the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from removal_data.sources.layouts import add_file, list_endings, list_files, without_ending
from removal_data.sources.samples import Finding

Paths = dict[str, Path]
"""Files by the name of the image that they belong to."""


@dataclass(frozen=True)
class Job:
    """An image to edit, and what belongs to it.

    Attributes:
        name: of the image within its folder.
        image: its file.
        mask: the file of its mask; `None` where transparent pixels are the mask.
        ref: the file of its reference; `None` without one.
        outputs: the file to be written for each seed; without a suffix, in the image's format.
    """

    name: str
    image: Path
    mask: Path | None
    ref: Path | None
    outputs: dict[int, Path]


def find_jobs(
    image: Path, mask: Path | None, ref: Path | None, output: Path, seeds: Sequence[int]
) -> tuple[list[Job], list[Finding]]:
    """Return the images to edit in the order of their names, and what is wrong with others.

    Args:
        image: a file, or a folder of images: with the folders `src` and `mask`, or with masks whose
            names end with `_mask` or `_M`, unless `mask` says where these are.
        mask: a file for all images, or a folder with masks by name.
        ref: the same for references.
        output: the file to be written or, for a folder of images, the folder.
        seeds: of the noise.

    Raises:
        FileNotFoundError: a folder is missing, or holds no images.
        ValueError: a folder of masks or references is given for a single image.
    """
    if not image.is_dir():
        for part, path in (("mask", mask), ("ref", ref)):
            if path is not None and path.is_dir():
                raise ValueError(f"Expected --{part} to be a file, as --image is, but got {path}.")
        return [Job(image.name, image, mask, ref, with_seeds(output, seeds))], []
    findings: list[Finding] = []
    root = image / "src" if (image / "src").is_dir() else image
    if mask is None and root != image:
        mask = image / "mask"
    images, masks = find_images(root, mask, output, findings)
    refs = {} if ref is None else find_part("ref", ref, images, findings)
    broken = {finding.sample for finding in findings}
    jobs = [
        Job(name, path, masks.get(name), refs.get(name), with_seeds(place, seeds))
        for name, path in sorted(images.items())
        if name not in broken
        for place in (output / path.relative_to(root),)
    ]
    return jobs, findings


def with_seeds(output: Path, seeds: Sequence[int]) -> dict[int, Path]:
    """Return the file of every seed; only with several the seed is in its name.

    Example:
        >>> {seed: path.name for seed, path in with_seeds(Path("dog.jpg"), (0, 7)).items()}
        {0: 'dog_seed0.jpg', 7: 'dog_seed7.jpg'}
    """
    if len(seeds) == 1:
        return {seeds[0]: output}
    return {seed: output.with_name(f"{output.stem}_seed{seed}{output.suffix}") for seed in seeds}


def without_existing(jobs: Sequence[Job]) -> list[Job]:
    """Leave out outputs that exist, and images all of whose outputs do."""
    left = []
    for job in jobs:
        outputs = {seed: path for seed, path in job.outputs.items() if not path.exists()}
        if outputs:
            left.append(replace(job, outputs=outputs))
    return left


def find_images(
    root: Path, mask: Path | None, output: Path, findings: list[Finding]
) -> tuple[Paths, Paths]:
    """Return the images in a folder and their masks; what is wrong is added to the findings.

    Raises:
        FileNotFoundError: there are no images.
    """
    files: dict[str, Paths] = {"src": {}}
    found: list[Finding] = []
    if mask is None:
        files = list_endings(root, found)
    else:
        for name, path in list_files(root):
            add_file(files, "src", name, path, found)
    # Earlier outputs may lie among the images.
    old = {n for n, path in files["src"].items() if output in path.parents and output != root}
    images = {name: path for name, path in files["src"].items() if name not in old}
    findings += [f for f in found if f.part in ("src", "mask") and f.sample not in old]
    if not images:
        raise FileNotFoundError(f"Expected images in {root}, but got none.")
    if mask is not None:
        return images, find_part("mask", mask, images, findings)
    findings += [
        alone("mask", name, path) for name, path in files["mask"].items() if name not in images
    ]
    return images, files["mask"]


def find_part(part: str, place: Path, images: Paths, findings: list[Finding]) -> Paths:
    """Return the masks or references of images by name; what is wrong is added to the findings.

    Args:
        part: `mask` or `ref`.
        place: a folder, or a file for all images.
        images: by name.
        findings: receives images without the part, and files without an image.

    Raises:
        FileNotFoundError: the place does not exist.
    """
    if place.is_file():
        return dict.fromkeys(images, place)
    if not place.is_dir():
        raise FileNotFoundError(f"Expected --{part} to be a file or a folder, but got {place}.")
    files: dict[str, Paths] = {part: {}}
    for name, path in list_files(place):
        add_file(files, part, without_ending(name, part, images), path, findings)
    findings += [
        Finding(name, part, "missing", f"{path} has no {part} in {place}.")
        for name, path in images.items()
        if name not in files[part]
    ]
    findings += [
        alone(part, name, path) for name, path in files[part].items() if name not in images
    ]
    return files[part]


def alone(part: str, name: str, path: Path) -> Finding:
    """Return the finding of a mask or reference that belongs to no image."""
    return Finding(name, "src", "missing", f"{path} is a {part} of no image.")
