"""The API reference: every public name has one entry, on the page of its module."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from reference_tables import DOCUMENTATION, ROOT

import moe_lora

FOLDER = ROOT / "docs" / "reference" / "api"
DIRECTIVE = re.compile(r"^\.\. auto(module|class|function|data):: (\S+)$", re.MULTILINE)
LINK = re.compile(r"\{py:obj\}`~([\w.]+)`")
MODULE_LINK = re.compile(r"\{py:mod\}`([\w.]+)`")
NAME = re.compile(r"(?<![\w./-])moe_lora(?:\.\w+)+")
HIDDEN = re.compile(r"<!--.*?-->", re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE_ENDINGS = {"py", "md", "json", "safetensors", "log"}


def inner_modules(module: str) -> list[str]:
    """List the submodules that a public module names in its `__all__`."""
    found = importlib.import_module(module)
    return [f"{module}.{n}" for n in found.__all__ if inspect.ismodule(getattr(found, n))]


def values_of(module: str) -> dict[str, object]:
    found = importlib.import_module(module)
    values = {name: getattr(found, name) for name in found.__all__}
    return {name: value for name, value in values.items() if not inspect.ismodule(value)}


def entries_of(page: Path) -> list[str]:
    """List the full names that a page documents."""
    entries, module = [], ""
    for kind, name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
        if kind == "module":
            module = name
        else:
            entries.append(f"{module}.{name}")
    return entries


def expected_entries(module: str) -> list[str]:
    """List what the page of a module documents: what no page of its own or outer module does."""
    own = set(values_of(module))
    if module == "moe_lora":
        for inner in inner_modules(module):
            own -= set(values_of(inner))
        return [f"{module}.{name}" for name in own]
    nested = [
        f"{inner}.{name}" for inner in inner_modules(module) for name in set(values_of(inner)) - own
    ]
    return [*(f"{module}.{name}" for name in own), *nested]


MODULES = ["moe_lora", *inner_modules("moe_lora")]


def test_every_public_module_has_a_page() -> None:
    pages = {page.stem for page in FOLDER.glob("*.md")}
    assert pages == {module.rpartition(".")[2] for module in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_page_documents_the_public_names_of_its_module_once(module: str) -> None:
    page = FOLDER / f"{module.rpartition('.')[2]}.md"
    assert page.read_text(encoding="utf-8").startswith(f"# {module}\n")
    assert sorted(entries_of(page)) == sorted(expected_entries(module))


def test_the_first_page_links_to_every_name_of_the_package() -> None:
    page = FOLDER / "moe_lora.md"
    text = page.read_text(encoding="utf-8")
    linked = LINK.findall(text)
    documented = {name for other in FOLDER.glob("*.md") for name in entries_of(other)}
    assert set(linked) <= documented
    names = [name.rpartition(".")[2] for name in (*linked, *entries_of(page))]
    assert sorted(names) == sorted(values_of("moe_lora"))
    assert set(MODULE_LINK.findall(text)) == set(MODULES) - {"moe_lora"}


def private_part(name: str) -> str | None:
    """Return the first part of a dotted name that is not public, `None` where all of it is."""
    found: object = moe_lora
    for part in name.split(".")[1:]:
        if not inspect.ismodule(found):
            return None if hasattr(found, part) else part
        if part != "__version__" and part not in found.__all__:
            return part
        found = getattr(found, part)
    return None


def imported_names(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moe_lora":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("page", DOCUMENTATION, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_names_public_names_only(page: Path) -> None:
    shown = HIDDEN.sub("", page.read_text(encoding="utf-8"))
    names = [n for n in NAME.findall(shown) if n.split(".")[-1] not in FILE_ENDINGS]
    names += [name for code in CODE.findall(shown) for name in imported_names(code)]
    assert {name: private_part(name) for name in names if private_part(name)} == {}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("moe_lora.route", None),
        ("moe_lora.masks.augmentation.dilate", None),
        ("moe_lora.masks.MaskInfo.features", None),
        ("moe_lora.masks.analysis.contour", "analysis"),
        ("moe_lora.gate", "gate"),
        ("moe_lora.masks.MaskInfo.missing", "missing"),
    ],
)
def test_private_parts_are_found(name: str, part: str | None) -> None:
    assert private_part(name) == part
