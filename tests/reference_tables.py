"""The tables of configuration, commands and options in docs/reference, made of the code.

`python -m reference_tables`, run in `tests/`, writes them into the pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_lora import MoELoraConfig
from moe_lora.cli.main import parser
from moe_lora.export.formats.tools import tool_table
from options.loss_options import LossOptions
from options.mixture_options import MixtureOptions
from options.sharing_options import SharingOptions
from options.train_options import ModelOptions, RunOptions
from options.validation_options import ValidationOptions
from remove import build_parser

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "reference"
DOCUMENTATION = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]


def config_table() -> str:
    """Return one row per field of `MoELoraConfig` that PEFT's own config lacks."""
    own = vars(MoELoraConfig)["__annotations__"]
    rows = [
        (f"`{field.name}`", f"`{_default(field)}`", _escaped(field.metadata["help"]))
        for field in dataclasses.fields(MoELoraConfig)
        if field.name in own
    ]
    return _table(("field", "default", "meaning"), rows)


def command_table(
    command: argparse.ArgumentParser, described: Mapping[str, str] = MappingProxyType({})
) -> str:
    """Return one row per argument of a command; defaults that are `described` are not its own."""
    rows = []
    for action in command._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = action.option_strings[0] if action.option_strings else action.dest.upper()
        choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
        own = f"`{action.default}`" if action.default not in (None, False) else ""
        default = described.get(action.dest, own)
        rows.append((f"`{name}`", choices, default, _escaped(action.help or "")))
    return _table(("argument", "choices", "default", "meaning"), rows)


def options_table(group: type) -> str:
    """Return one row per option of a group of `train.py`; those of its base classes come last."""
    own = vars(group)["__annotations__"]
    rows = [
        (f"`--{field.name}`", _shown_default(field), _escaped(field.metadata["help"]))
        for field in sorted(dataclasses.fields(group), key=lambda field: field.name not in own)
    ]
    return _table(("option", "default", "meaning"), rows)


def export_tools_table() -> str:
    """Return one row per tool that loads exported LoRAs."""
    rows = [(f"`{tool}`", *cells) for tool, *cells in tool_table()]
    return _table(("`tool`", "name", '`"diffusers"`', '`"kohya"`', '`"peft"`'), rows)


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of the subcommands by name."""
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def written_into(page: str, tables: dict[str, str]) -> str:
    """Return a page with the present tables between its markers."""
    for name, table in tables.items():
        start, end = f"<!-- {name}: start -->\n", f"<!-- {name}: end -->"
        before, after = page.split(start)[0], page.split(end)[1]
        page = f"{before}{start}\n{table}\n\n{end}{after}"
    return page


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return repr(field.default)


def _shown_default(field: dataclasses.Field[Any]) -> str:
    described = {
        "flux_fill_id": "the tiny model",
        "train_data_dir": "required",
        "target_modules": "attention and feed-forward",
    }
    if field.name in described:
        return described[field.name]
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    if field.default is None or field.default_factory is list:
        return ""
    return f"`{field.default}`"


def _escaped(text: str) -> str:
    return re.sub(r"([|*_<>])", r"\\\1", text)


def _table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


PAGES: dict[Path, dict[str, str]] = {
    FOLDER / "config.md": {"fields": config_table()},
    FOLDER / "flux_example_options.md": {
        "models": options_table(ModelOptions),
        "mixture": options_table(MixtureOptions),
        "losses": options_table(LossOptions),
        "run": options_table(RunOptions),
        "validation": options_table(ValidationOptions),
        "sharing": options_table(SharingOptions),
    },
    FOLDER / "flux_example_removal_options.md": {
        "remove": command_table(
            build_parser(),
            {
                "image": "required",
                "checkpoint": "required",
                "flux_fill_id": "the tiny model",
                "seeds": "`0`",
                "device": "`cuda` where there is one, else `cpu`",
                "dtype": "`bf16` on `cuda`, else `fp32`",
            },
        )
    },
    ROOT / "docs" / "how_to" / "export_and_import_loras.md": {"tools": export_tools_table()},
    FOLDER / "cli.md": {name: command_table(command) for name, command in commands().items()},
}

if __name__ == "__main__":
    for path, tables in PAGES.items():
        path.write_text(written_into(path.read_text(encoding="utf-8"), tables), encoding="utf-8")
