"""The examples show what users may rely on: they import public names of moe_lora only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moe_lora

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(EXAMPLES.rglob("*.py"))
OPEN_MODULES = {
    "moe_lora": moe_lora,
    "moe_lora.ablation": moe_lora.ablation,
    "moe_lora.flow": moe_lora.flow,
    "moe_lora.losses": moe_lora.losses,
    "moe_lora.masks": moe_lora.masks,
    "moe_lora.masks.augmentation": moe_lora.masks.augmentation,
    "moe_lora.metrics": moe_lora.metrics,
    "moe_lora.plots": moe_lora.plots,
    "moe_lora.schedules": moe_lora.schedules,
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
    assert {"train.py", "remove.py", "demo.py"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_examples_use_public_names_only(file: Path) -> None:
    assert private_uses(file.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("code", "wrong"),
    [
        ("import moe_lora.routing.state", {"moe_lora.routing.state"}),
        ("from moe_lora.layer import MoELoraLinear", {"moe_lora.layer.MoELoraLinear"}),
        ("from moe_lora import routing", {"moe_lora.routing"}),
        ("from moe_lora.losses import removal", {"moe_lora.losses.removal"}),
        ("from moe_lora import *", {"moe_lora.*"}),
        ("import moe_lora\nmoe_lora.routing.gate(1)", {"moe_lora.routing"}),
        ("import moe_lora\nmoe_lora.masks.analysis", {"moe_lora.masks.analysis"}),
        ("def late():\n    from moe_lora.merging import merge", {"moe_lora.merging.merge"}),
        ("import moe_lora\nmoe_lora.masks.analyze\nmoe_lora.route", set()),
        ("from moe_lora import MoELoraConfig, flow, losses\nimport peft.tuners", set()),
        ("from moe_lora.losses import RemovalLoss", set()),
        ("from moe_lora.flow import pack_latents", set()),
    ],
)
def test_the_reader_sees_every_kind_of_use(code: str, wrong: set[str]) -> None:
    assert private_uses(code) == wrong
