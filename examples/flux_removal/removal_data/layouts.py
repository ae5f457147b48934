"""Find the samples in a folder."""

from __future__ import annotations

from pathlib import Path

from image_io.image_files import IMAGE_SUFFIXES
from image_io.mask_reading import MASK_SUFFIXES
from removal_data.samples import Finding, Sample

PARTS = ("src", "mask", "result", "ref")


def suffixes(part: str) -> tuple[str, ...]:
    """Return the suffixes of the files of a part, in lower case."""
    return MASK_SUFFIXES if part == "mask" else IMAGE_SUFFIXES


def list_part(directory: Path, part: str) -> tuple[dict[str, Path], list[Finding]]:
    """List the files of a part by the names of their samples.

    Raises:
        FileNotFoundError: when the directory is missing.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"Expected a folder {directory}, but there is none.")
    found: dict[str, Path] = {}
    findings = []
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() not in suffixes(part) or path.name.startswith("."):
            continue
        if path.stem in found:
            text = (
                f"Sample {path.stem!r} has two files for `{part}`: {found[path.stem]} and {path}."
            )
            findings.append(Finding(path.stem, part, "ambiguous", text))
        found[path.stem] = path
    return found, findings


def find_samples(folder: Path) -> tuple[list[Sample], list[Finding]]:
    """Find the samples of the layout `folder/{src,mask,result,ref}/STEM.SUFFIX`.

    Args:
        folder: holds `src`, `mask`, `result` and, if wanted, `ref`.

    Returns:
        The complete samples in the order of their names, and the errors of all others.

    Raises:
        FileNotFoundError: when a folder is missing, or none holds a file.
    """
    parts = PARTS if (folder / "ref").is_dir() else PARTS[:3]
    files: dict[str, dict[str, Path]] = {}
    findings: list[Finding] = []
    for part in parts:
        files[part], ambiguous = list_part(folder / part, part)
        findings += ambiguous
    names = sorted({name for found in files.values() for name in found})
    if not names:
        raise FileNotFoundError(
            f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {folder / 'src'}, but got none."
        )
    for name in names:
        other = next(files[part][name] for part in parts if name in files[part])
        findings += [
            Finding(
                name,
                part,
                "missing",
                f"Sample {name!r} has no `{part}`: expected {folder / part / name}.* "
                f"({', '.join(suffixes(part))}) beside {other}.",
            )
            for part in parts
            if name not in files[part]
        ]
    broken = {finding.sample for finding in findings}
    samples = [
        Sample(name, {part: files[part][name] for part in parts})
        for name in names
        if name not in broken
    ]
    return samples, findings
