"""Read a data set of Hugging Face's library `datasets`: an image folder, parquet files, the hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from removal_data.sources.manifests import build_sample, check_row
from removal_data.sources.samples import PARTS, Sample

SCHEME = "datasets:"

KNOWN_TYPES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"BM": ".bmp"}
KNOWN_TYPES |= {b"II*\x00": ".tif", b"MM\x00*": ".tif"}


def suffix_of(image: dict[str, Any]) -> str:
    """Return the suffix of an encoded image, by its first bytes or its former path."""
    for start, suffix in KNOWN_TYPES.items():
        if image["bytes"].startswith(start):
            return suffix
    return Path(image["path"] or "image.avif").suffix


def file_of(image: dict[str, Any], folder: Path, stem: str) -> Path:
    """Return the file of an image; one that is inside of a table is written to a folder once."""
    if image["bytes"] is None:
        return Path(image["path"])
    path = folder / f"{stem}{suffix_of(image)}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_bytes(image["bytes"])
        part.replace(path)
    return path


def read_hugging_face(name: str) -> list[Sample]:
    """Read the split `train` of a data set.

    Its columns are those of a manifest; `src`, `mask`, `result` and `ref` are images. Images inside
    of parquet files are written to the cache of `datasets` once.

    Args:
        name: of a folder with `metadata.jsonl` (`src_file_name`, `mask_file_name`, ...) or with
            parquet files, or of a data set on the hub.

    Raises:
        ImportError: without the package `datasets`.
        ValueError: for other columns.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f'{SCHEME}{name} needs the package datasets: pip install "moe-lora[data]"'
        ) from error
    table = datasets.load_dataset(name, split="train")
    parts = [part for part in PARTS if part in table.column_names]
    for part in parts:
        table = table.cast_column(part, datasets.Image(decode=False))
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "moe_lora" / table._fingerprint
    samples = []
    for index, row in enumerate(table):
        stem = f"{index:07d}"
        files = {part: file_of(row[part], cache / part, stem) for part in parts if row[part]}
        told = {key: value for key, value in row.items() if key not in PARTS and value is not None}
        told = check_row(told | {p: str(f) for p, f in files.items()}, f"row {index} of {name}")
        samples.append(build_sample(told, files, told.get("name", stem)))
    return samples
