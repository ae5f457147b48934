"""The examples show what users may rely on: they import public names of moe_lora only.

Benchmarks use the examples as users do: through the command lines of their scripts.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

import moe_lora

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(EXAMPLES.rglob("*.py"))
BENCHMARKS = sorted((EXAMPLES.parent / "benchmarks").glob("*.py"))
COMMAND_LINE = {"main", "parse_options"}
"""What a benchmark may use of a script."""

# The public submodules are those that the top names, and `masks.augmentation`.
OPEN_MODULES: dict[str, ModuleType] = {
    "moe_lora": moe_lora,
    "moe_lora.masks.augmentation": moe_lora.masks.augmentation,
    **{
        f"moe_lora.{name}": value
        for name, value in vars(moe_lora).items()
        if name in moe_lora.__all__ and isinstance(value, ModuleType)
    },
}


def public_names(module: str) -> set[str]:
    found = OPEN_MODULES[module]
    named = getattr(found, "__all__", None)
    return set(named if named is not None else (n for n in vars(found) if n[0] != "_"))


def private_uses(code: str) -> set[str]:
    wrong: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            wrong |= {
                alias.name
                for alias in node.names
                if alias.name.split(".")[0] == "moe_lora" and alias.name not in OPEN_MODULES
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moe_lora":
            module = node.module or ""
            known = public_names(module) if module in OPEN_MODULES else set()
            wrong |= {f"{module}.{a.name}" for a in node.names if a.name not in known}
        elif isinstance(node, ast.Attribute):
            dotted = ast.unparse(node.value)
            if dotted in OPEN_MODULES and node.attr not in public_names(dotted):
                wrong.add(f"{dotted}.{node.attr}")
    return wrong


def test_there_are_examples() -> None:
    scripts = {"train.py", "remove.py", "evaluate.py", "demo.py", "make_data.py"}
    assert scripts <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_examples_use_public_names_only(file: Path) -> None:
    assert private_uses(file.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import moe_lora.routing.state", {"moe_lora.routing.state"}),
        ("from moe_lora.tuner.layer import MoELoraLinear", {"moe_lora.tuner.layer.MoELoraLinear"}),
        ("from moe_lora import tracing", {"moe_lora.tracing"}),
        ("from moe_lora.losses import removal", {"moe_lora.losses.removal"}),
        ("from moe_lora import *", {"moe_lora.*"}),
        ("import moe_lora\nmoe_lora.routing.state", {"moe_lora.routing.state"}),
        ("import moe_lora\nmoe_lora.masks.analysis", {"moe_lora.masks.analysis"}),
        (
            "def late():\n    from moe_lora.tuner.merging import merge",
            {"moe_lora.tuner.merging.merge"},
        ),
        ("import moe_lora\nmoe_lora.masks.analyze\nmoe_lora.routing.gate(1)", set()),
        ("from moe_lora import MoELoraConfig, flow, losses\nimport peft.tuners", set()),
        ("from moe_lora.losses import RemovalLoss", set()),
        ("from moe_lora.flow import pack_latents", set()),
    ],
)
def test_the_reader_sees_every_kind_of_use(code: str, wrong: set[str]) -> None:
    assert private_uses(code) == wrong


def modules_of_the_examples() -> tuple[set[str], set[str]]:
    """Return the modules that the folders of the examples hold: scripts, and all others."""
    scripts, inner = set(), set()
    for path in EXAMPLES.glob("*/*"):
        if path.suffix == ".py":
            is_script = 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
            (scripts if is_script else inner).add(path.stem)
        elif any(path.glob("*.py")):
            inner.add(path.name)
    return scripts, inner


def inner_uses(code: str) -> set[str]:
    """Return what a benchmark uses of an example beyond the command lines of its scripts."""
    scripts, inner = modules_of_the_examples()
    wrong, renamed = set(), {name: name for name in scripts}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            wrong |= {a.name for a in node.names if a.name.split(".")[0] in inner}
            renamed |= {a.asname: a.name for a in node.names if a.asname and a.name in scripts}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            used = {f"{node.module}.{a.name}" for a in node.names if a.name not in COMMAND_LINE}
            wrong |= {module} if module in inner else used if module in scripts else set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            script = renamed.get(node.value.id)
            if script is not None and node.attr not in COMMAND_LINE:
                wrong.add(f"{script}.{node.attr}")
    return wrong


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.name)
def test_benchmarks_use_the_command_lines_of_the_examples_only(file: Path) -> None:
    assert inner_uses(file.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("from removal_data.dataset import RemovalDataset", {"removal_data"}),
        ("import evaluation.measuring", {"evaluation.measuring"}),
        ("def late():\n    from scenes import random_scene", {"scenes"}),
        ("from train import training_step", {"train.training_step"}),
        ("import train as t\nt.training_step", {"train.training_step"}),
        ("import evaluate\nevaluate.run_models()", {"evaluate.run_models"}),
        ("import evaluate\nevaluate.main([])\nfrom train import parse_options", set()),
        ("import torch, yaml\nfrom measuring import machine", set()),
    ],
)
def test_inner_uses_are_found(code: str, wrong: set[str]) -> None:
    assert inner_uses(code) == wrong
