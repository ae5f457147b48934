"""Pages for maintainers name files that exist, and the arrows that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_import_graph import ARROWS

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
LIBRARY = "src/moe_lora"
PATH = re.compile(
    r"(?<![\w./-])(?:[\w.-]+/)*(?:[\w.-]+\.(?:py|md|toml|txt|ya?ml)|[\w-]+/)(?![\w(])"
)


def paths_in(text: str) -> list[str]:
    """List the paths in code spans and text diagrams."""
    diagrams = re.findall(r"^```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return [path for part in (*spans, *diagrams) for path in PATH.findall(part)]


def exists(path: str) -> bool:
    """Tell whether a path is in the repository or the library; names alone are found anywhere."""
    if any((ROOT / base / path).exists() for base in ("", LIBRARY)):
        return True
    return "/" not in path and any((ROOT / LIBRARY).rglob(path))


@pytest.mark.parametrize("page", [ARCHITECTURE, CONTRIBUTING], ids=lambda page: page.name)
def test_a_page_names_files_that_exist(page: Path) -> None:
    paths = paths_in(page.read_text(encoding="utf-8"))
    assert len(paths) > 20
    assert [path for path in paths if not exists(path)] == []


def test_the_architecture_names_classes_and_functions_that_exist() -> None:
    code = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / LIBRARY).rglob("*.py"))
    defined = set(re.findall(r"(?:class|def) (\w+)", code))
    text = ARCHITECTURE.read_text(encoding="utf-8")
    named = set(re.findall(r"\b[A-Z][a-z]+[A-Z]\w+|\b(?:begin|end)_pass\b", text))
    named |= {name for _, name in re.findall(r"\b([A-Z]\w+)\.(\w+)", text)}
    assert len(named) >= 12
    attributes = set(re.findall(r"self\.(\w+)(?::.*)? = ", code))
    assert named - defined - attributes == {"LoRA", "LoRAs"}


def test_missing_files_are_found() -> None:
    text = "`tuner/layer.py` `tuner/no_layer.py`\n```text\na  routing/none/\n```\n"
    assert [path for path in paths_in(text) if not exists(path)] == [
        "tuner/no_layer.py",
        "routing/none/",
    ]


def test_the_diagram_has_the_arrows_of_the_import_graph() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8").partition("## Imports")[2]
    lines = re.findall(r"^(\w+) ─+► (.+)$", text, re.MULTILINE)
    assert {name: set(imported.split()) for name, imported in lines} == {
        name: imported for name, imported in ARROWS.items() if imported
    }
    order = [name for name, _ in lines]
    assert all(
        other not in order[: order.index(name)] for name, found in lines for other in found.split()
    )


def test_the_ten_questions_have_files_as_answers() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8").partition("## Where is what?")[2]
    rows = re.findall(r"^\| (.+\?) \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 10
    assert all(paths_in(answer) for _, answer in rows)
