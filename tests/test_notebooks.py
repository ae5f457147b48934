"""The notebooks are complete, small and use public names; CI runs them with nbmake."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_examples_public import private_uses

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_000_000

notebooks = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def cells_of(file: Path, kind: str) -> list[dict[str, Any]]:
    content = json.loads(file.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 2


@notebooks
def test_a_notebook_was_run_once_from_top_to_bottom(file: Path) -> None:
    cells = cells_of(file, "code")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert {output["output_type"] for output in outputs} <= {
        *("stream", "display_data", "execute_result")
    }
    assert all(output.get("name") != "stderr" for output in outputs)


@notebooks
def test_a_notebook_is_small_and_has_no_paths(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text) < LARGEST
    assert not re.search(r"/(root|tmp|work|home|venv)/", text)


@notebooks
def test_a_notebook_uses_public_names(file: Path) -> None:
    lines = [line for cell in cells_of(file, "code") for line in source_of(cell).splitlines()]
    code = "\n".join(line for line in lines if not line.startswith("%"))
    assert private_uses(code) == set()


@notebooks
def test_a_notebook_begins_with_its_title(file: Path) -> None:
    first = source_of(cells_of(file, "markdown")[0])
    assert first.startswith("# ")
