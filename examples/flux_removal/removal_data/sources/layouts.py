"""Find the samples of a folder, of a manifest or of a Hugging Face data set."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from pathlib import Path

from image_io.image_files import IMAGE_SUFFIXES
from image_io.mask_reading import MASK_SUFFIXES
from removal_data.sources.hugging_face import SCHEME, read_hugging_face
from removal_data.sources.manifests import read_manifest
from removal_data.sources.samples import PARTS, Finding, Sample

MANIFEST = "manifest.jsonl"

ENDINGS = {
    "src": ("_src", "_input", "_F"),
    "mask": ("_mask", "_M"),
    "result": ("_result", "_target", "_gt", "_G"),
    "ref": ("_ref",),
}
"""What the stem of a file may end with to say its part; without any of them it is a source."""

Files = dict[str, dict[str, Path]]
"""Paths by part and by the name of the sample."""


def suffixes(part: str) -> tuple[str, ...]:
    """Return the suffixes of the files of a part, in lower case."""
    return MASK_SUFFIXES if part == "mask" else IMAGE_SUFFIXES


def list_files(directory: Path) -> Iterator[tuple[str, Path]]:
    """List the files below a directory with their names.

    The name is the path without its suffix, in Unicode's composed form (NFC): macOS and some
    archives write accents as characters of their own.
    """
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            yield unicodedata.normalize("NFC", relative.with_suffix("").as_posix()), path


def add_file(files: Files, part: str, name: str, path: Path, findings: list[Finding]) -> None:
    """Add a file, unless its suffix is not one of its part; a second one is an error."""
    if path.suffix.lower() not in suffixes(part):
        return
    if name in files[part]:
        both = f"{files[part][name]} and {path}"
        text = f"Sample {name!r} has two files for `{part}`: {both}."
        findings.append(Finding(name, part, "ambiguous", text))
    files[part][name] = path


def list_folders(folder: Path, findings: list[Finding]) -> Files:
    """List the layout `folder/{src,mask,result,ref}/[FOLDERS/]STEM[ENDING].SUFFIX`.

    Raises:
        FileNotFoundError: when a folder is missing.
    """
    parts = PARTS if (folder / "ref").is_dir() else PARTS[:3]
    files: Files = {part: {} for part in parts}
    for part in parts:
        directory = folder / part
        if not directory.is_dir():
            raise FileNotFoundError(f"Expected a folder {directory}, but there is none.")
        found = list(list_files(directory))
        for name, path in found:
            add_file(files, part, name, path, findings)
    for part in parts[1:]:
        files[part] = {
            without_ending(name, part, files["src"]): path for name, path in files[part].items()
        }
    return files


def without_ending(name: str, part: str, sources: dict[str, Path]) -> str:
    """Return the name of the source that a file such as `STEM_mask` belongs to."""
    for ending in ENDINGS[part]:
        stem = name.removesuffix(ending)
        for source in (stem, *(stem + other for other in ENDINGS["src"])):
            if name not in sources and source in sources:
                return source
    return name


def list_endings(folder: Path, findings: list[Finding]) -> Files:
    """List the layout `folder/[FOLDERS/]STEM[ENDING].SUFFIX`, where endings say the part."""
    files: Files = {part: {} for part in PARTS}
    for name, path in list_files(folder):
        part, stem = next(
            (
                (part, name.removesuffix(ending))
                for part, endings in ENDINGS.items()
                for ending in endings
                if name.endswith(ending)
            ),
            ("src", name),
        )
        add_file(files, part, stem, path, findings)
    if not files["ref"]:
        del files["ref"]
    return files


def missing(folder: Path, part: str, name: str, other: Path, *, by_folder: bool) -> Finding:
    """Return the error of a sample without one of its parts."""
    expected = f"{folder / part / name}.*" if by_folder else f"{folder / name}{ENDINGS[part][0]}.*"
    text = (
        f"Sample {name!r} has no `{part}`: expected {expected} ({', '.join(suffixes(part))}) "
        f"beside {other}."
    )
    return Finding(name, part, "missing", text)


def find_samples(source: str | Path) -> tuple[list[Sample], list[Finding]]:
    """Find the samples of a data set.

    Args:
        source: a folder with the folders `src`, `mask`, `result` and, if wanted, `ref`; a folder
            with files whose names end with their part; a manifest, or the folder of a
            `manifest.jsonl`; or `datasets:NAME` for a Hugging Face data set.

    Returns:
        The complete samples in the order of their names, and the errors of all others.

    Raises:
        FileNotFoundError: when a folder is missing, or none holds a file.
        ValueError: when a manifest or a data set is not what is expected.
    """
    if str(source).startswith(SCHEME):
        return read_hugging_face(str(source).removeprefix(SCHEME)), []
    if str(source).startswith("shards:"):
        raise ValueError(
            f"Expected samples that can be listed, but got {source}: only train.py reads shards."
        )
    folder = Path(source)
    if folder.is_file():
        return read_manifest(folder)
    if (folder / MANIFEST).is_file():
        return read_manifest(folder / MANIFEST)
    findings: list[Finding] = []
    by_folder = any((folder / part).is_dir() for part in PARTS[:3]) or not folder.is_dir()
    files = list_folders(folder, findings) if by_folder else list_endings(folder, findings)
    names = sorted({name for found in files.values() for name in found})
    if not names:
        raise FileNotFoundError(
            f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {folder / 'src'}, but got none."
        )
    for name in names:
        other = next(files[part][name] for part in files if name in files[part])
        findings += [
            missing(folder, part, name, other, by_folder=by_folder)
            for part in files
            if name not in files[part]
        ]
    broken = {finding.sample for finding in findings}
    samples = [
        Sample(name, {part: files[part][name] for part in files})
        for name in names
        if name not in broken
    ]
    return samples, findings
