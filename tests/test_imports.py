"""masks, losses and flow are tensor functions that any codebase can take: read their imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "moe_lora"
PURE = ("moe_lora.masks", "moe_lora.losses", "moe_lora.metrics", "moe_lora.flow")
FORBIDDEN = ("peft", "diffusers", "transformers", "accelerate")
FOLDERS = ("masks", "losses", "metrics")
FILES = sorted(
    [SOURCE / "flow.py", *(file for name in FOLDERS for file in SOURCE.glob(f"{name}/**/*.py"))]
)


def imported_modules(code: str, package: str) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - (node.level - 1)]
            base = ".".join(parents if node.level else []) + ("." if node.level else "")
            module = (base + (node.module or "")).strip(".")
            modules |= {f"{module}.{alias.name}" for alias in node.names}
    return modules


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def wrong_imports(code: str, package: str) -> set[str]:
    return {
        module
        for module in imported_modules(code, package)
        if is_within(module, FORBIDDEN)
        or (is_within(module, ("moe_lora",)) and not is_within(module, PURE))
    }


def test_there_are_files_to_read() -> None:
    assert {file.relative_to(SOURCE).parts[0] for file in FILES} == {"flow.py", *FOLDERS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_pure_modules_import_neither_peft_nor_diffusers_nor_the_tuner(file: Path) -> None:
    package = ".".join(file.relative_to(SOURCE.parent).parent.parts)
    assert wrong_imports(file.read_text(encoding="utf-8"), package) == set()


def test_pure_modules_load_without_peft_diffusers_and_the_tuner() -> None:
    """Load them below an empty `moe_lora`, since the package itself imports the tuner."""
    code = f"""
import importlib, sys, types
package = types.ModuleType("moe_lora")
package.__path__ = [{str(SOURCE)!r}]
sys.modules["moe_lora"] = package
for name in {PURE!r}:
    importlib.import_module(name)
roots = {{name.split(".")[0] for name in sys.modules}}
own = {{name.split(".")[1] for name in sys.modules if name.startswith("moe_lora.")}}
print(sorted(roots & set({FORBIDDEN!r})), sorted(own))
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[] ['flow', 'losses', 'masks', 'metrics']"


def test_model_families_are_data() -> None:
    files = sorted(SOURCE.glob("families/*.py"))
    assert len(files) > 4
    for file in files:
        found = imported_modules(file.read_text(encoding="utf-8"), "moe_lora.families")
        own = {module for module in found if is_within(module, ("moe_lora",))}
        assert {module for module in own if not is_within(module, ("moe_lora.families",))} == set()
        assert {module for module in found if is_within(module, FORBIDDEN)} == set()


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import peft.tuners", {"peft.tuners"}),
        ("from diffusers import AutoencoderKL", {"diffusers.AutoencoderKL"}),
        ("from moe_lora import MoELoraConfig", {"moe_lora.MoELoraConfig"}),
        ("from ..layer import MoELoraLinear", {"moe_lora.layer.MoELoraLinear"}),
        ("from .. import routing", {"moe_lora.routing"}),
        ("def late():\n    import peft", {"peft"}),
        ("from moe_lora import flow", set()),
        ("from . import base", set()),
        ("from ..masks import check_mask", set()),
        ("import torch", set()),
    ],
)
def test_the_reader_sees_every_kind_of_import(code: str, wrong: set[str]) -> None:
    assert wrong_imports(code, "moe_lora.losses") == wrong
