"""Read a manifest: a JSON object a line, with the files of one sample and how often it is dealt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from removal_data.sources.samples import PARTS, Finding, Sample

FURTHER = {"name": str, "caption": str, "kind": str, "repeats": int, "weight": (int, float)}


def check_row(row: Any, place: str) -> dict[str, Any]:
    """Raise unless a row has the keys and values of a sample.

    Raises:
        ValueError: naming the place of the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"Expected {place} to be a JSON object, but got {row!r}.")
    unknown = sorted(set(row) - {*PARTS, *FURTHER})
    absent = [part for part in PARTS[:3] if part not in row]
    if unknown or absent:
        raise ValueError(
            f"Expected {place} to have src, mask and result, and of {', '.join(('ref', *FURTHER))} "
            f"any, but got {sorted(row)}."
        )
    kinds: dict[str, Any] = {**dict.fromkeys(PARTS, str), **FURTHER}
    for key, kind in kinds.items():
        if key in row and (not isinstance(row[key], kind) or isinstance(row[key], bool)):
            raise ValueError(f"Expected `{key}` of another type in {place}, but got {row[key]!r}.")
    if row.get("repeats", 1) < 1 or not 0 < row.get("weight", 1) < float("inf"):
        raise ValueError(
            f"Expected `repeats` >= 1 and `weight` > 0 in {place}, but got {row.get('repeats', 1)} "
            f"and {row.get('weight', 1)}."
        )
    return dict(row)


def build_sample(row: dict[str, Any], files: dict[str, Path], name: str) -> Sample:
    """Return the sample of a checked row."""
    return Sample(
        name,
        files,
        caption=row.get("caption"),
        kind=row.get("kind"),
        repeats=row.get("repeats", 1),
        weight=float(row.get("weight", 1)),
    )


def unique(name: str, known: set[str]) -> str:
    """Return a name that is not known yet, and remember it."""
    found, number = name, 1
    while found in known:
        number += 1
        found = f"{name}-{number}"
    known.add(found)
    return found


def read_manifest(path: Path) -> tuple[list[Sample], list[Finding]]:
    """Read a manifest.

    Args:
        path: of a file with `{"src": ..., "mask": ..., "result": ...}` a line; `ref`, `caption`,
            `kind`, `repeats`, `weight` and `name` may be added. Paths are relative to its folder;
            several lines may share files.

    Returns:
        The samples whose files exist, in the order of the lines, and the errors of all others.

    Raises:
        FileNotFoundError: when it has no lines.
        ValueError: for a line that is no sample.
    """
    samples: list[Sample] = []
    findings: list[Finding] = []
    names: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        place = f"line {number} of {path}"
        try:
            row = check_row(json.loads(line), place)
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected JSON in {place}, but got an error: {error}.") from error
        name = unique(row.get("name", Path(row["src"]).with_suffix("").as_posix()), names)
        files = {part: path.parent / row[part] for part in PARTS if part in row}
        absent = [
            Finding(
                name, part, "missing", f"Sample {name!r} has no `{part}`: {place} names {file}."
            )
            for part, file in files.items()
            if not file.is_file()
        ]
        findings += absent
        if not absent:
            samples.append(build_sample(row, files, name))
    if not names:
        raise FileNotFoundError(f"Expected samples in {path}, but it has no lines.")
    return samples, findings
