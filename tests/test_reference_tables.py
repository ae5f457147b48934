"""The reference of the configuration and of the commands agrees with the code."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from peft import PeftConfig
from reference_tables import (
    DOCUMENTATION,
    FOLDER,
    PAGES,
    command_table,
    commands,
    written_into,
)

from moe_lora.cli.main import parser


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_tables_of_the_code(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert written_into(text, PAGES[page]) == text, "run `python -m reference_tables` in tests/"


def test_the_fields_of_peft_are_listed() -> None:
    text = (FOLDER / "config.md").read_text(encoding="utf-8").partition("## Fields of PEFT")[2]
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(PeftConfig))


def test_every_command_has_a_section() -> None:
    text = (FOLDER / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## moe-lora (\w+)$", text, re.MULTILINE) == list(commands())


def test_a_table_shows_choices_and_defaults() -> None:
    rows = command_table(commands()["export"]).splitlines()
    (row,) = (row for row in rows if "`--format`" in row)
    assert "`diffusers`, `peft`, `kohya` | `diffusers` |" in row


def test_commands_on_the_pages_parse() -> None:
    lines = [line for page in DOCUMENTATION for line in page.read_text("utf-8").splitlines()]
    parsed = [
        parser().parse_args(shlex.split(line, comments=True)[1:])
        for line in lines
        if line.startswith("moe-lora ")
    ]
    assert len(parsed) >= 5
