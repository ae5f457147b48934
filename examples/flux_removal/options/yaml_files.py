"""Options in YAML files: read as flags, and written so that they start a run again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from options.train_options import TrainOptions

OPTIONS = "options.yaml"


def yaml_flags(path: Path) -> list[str]:
    """Return the entries of a YAML file as flags, so that both are checked by the same parser."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"Expected {path} to hold `option: value` lines, but got {entries!r}.")
    flags: list[str] = []
    for name, value in entries.items():
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        words = [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
        # As one word, so that a value may begin with a hyphen.
        flags += [f"--{name}={words[0]}"] if len(words) == 1 else [f"--{name}", *words]
    return flags


def given_options(options: TrainOptions) -> dict[str, Any]:
    """Return the options as they were given: paths that follow from others are None."""
    values = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(TrainOptions)
    }
    if options.logging_dir == str(Path(options.output_dir) / "logs"):
        values["logging_dir"] = None
    return values


def dump_options(options: TrainOptions) -> str:
    """Return the options as YAML, which `parse_options` reads."""
    text: str = yaml.safe_dump(given_options(options), sort_keys=False, allow_unicode=True)
    return text


def write_options(options: TrainOptions) -> Path:
    """Write `options.yaml` into the output folder."""
    path = Path(options.output_dir) / OPTIONS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_options(options), encoding="utf-8")
    return path
