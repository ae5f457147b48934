"""The import graph of the library: every arrow between packages is listed, and none points up."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "moe_lora"

# Package or module directly below moe_lora -> those that it imports.
ARROWS: dict[str, set[str]] = {
    "_version": set(),
    "safetensors_io": set(),
    "tracing": set(),
    "flow": set(),
    "families": set(),
    "masks": set(),
    "losses": {"flow", "masks"},
    "metrics": {"losses", "masks"},
    "routing": {"families", "masks", "tracing"},
    "tuner": {"families", "routing", "tracing"},
    "checkpoint_reader": {"safetensors_io", "tuner"},
    "save_and_load": {"checkpoint_reader", "routing", "safetensors_io", "tuner"},
    "export": {"_version", "checkpoint_reader", "masks", "routing", "safetensors_io", "tuner"},
    "composition": {"export", "routing", "safetensors_io", "tuner"},
    "schedules": {"losses", "routing"},
    "ablation": {"losses", "routing", "tuner"},
    "plots": {"ablation", "masks"},
    "planning": {"routing", "tuner"},
    "cli": {"export", "planning", "tuner"},
}
# Tensor functions that any codebase can use, and tables.
INDEPENDENT = ("families", "flow", "losses", "masks", "metrics")
LOADED_BY_THE_IMPORT = {"torch", "peft", "safetensors", "kornia", "huggingface_hub", "numpy"}


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted(SOURCE.rglob("*.py"))}


def imports_of(code: str, module: str, is_package: bool) -> Iterator[str]:
    """Yield the modules that code imports anywhere, in functions and for types too."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".") if is_package else module.split(".")[:-1]
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in FILES else base


def imports_of_file(module: str) -> set[str]:
    file = FILES[module]
    code = file.read_text(encoding="utf-8")
    return set(imports_of(code, module, file.name == "__init__.py"))


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


GRAPH = {module: imports_of_file(module) for module in FILES}
OWN = {
    module: {i for i in found if i.split(".")[0] == "moe_lora"} for module, found in GRAPH.items()
}


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_what_its_arrows_allow_and_nothing_else(package: str) -> None:
    found = {
        package_of(imported)
        for module, own in OWN.items()
        if package_of(module) == package
        for imported in own
    }
    assert found - {package} == ARROWS[package]


def test_every_package_has_its_arrows_listed() -> None:
    assert {package_of(module) for module in FILES} - {""} == set(ARROWS)


def test_no_arrow_between_packages_is_part_of_a_circle() -> None:
    assert len(list(TopologicalSorter(ARROWS).static_order())) == len(ARROWS)


def test_no_import_between_modules_is_part_of_a_circle() -> None:
    # A package that a module lies in is loaded before it and says nothing about the order.
    order = {
        module: {i for i in own if i != module and not module.startswith(f"{i}.")}
        for module, own in OWN.items()
    }
    try:
        list(TopologicalSorter(order).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", INDEPENDENT)
def test_tensor_functions_and_tables_need_torch_and_kornia_only(package: str) -> None:
    foreign = {
        imported.split(".")[0]
        for module, found in GRAPH.items()
        if package_of(module) == package
        for imported in found
    }
    optional = {"lpips"} if package == "metrics" else set()
    assert foreign - set(sys.stdlib_module_names) - {"moe_lora", "torch", "kornia"} <= optional


def test_no_module_imports_diffusers() -> None:
    wrong = {m for m, found in GRAPH.items() if any(i.split(".")[0] == "diffusers" for i in found)}
    assert wrong == set()


def test_tensor_functions_load_without_the_rest_of_the_library() -> None:
    # Without `moe_lora/__init__.py`, which registers the PEFT method.
    code = (
        "import sys, types; package = types.ModuleType('moe_lora'); "
        f"package.__path__ = [{str(SOURCE)!r}]; sys.modules['moe_lora'] = package; "
        f"[__import__('moe_lora.' + name) for name in {INDEPENDENT!r}]; "
        "names = {name.split('.')[0] for name in sys.modules}; "
        "own = {name.split('.')[1] for name in sys.modules if name.startswith('moe_lora.')}; "
        "print(sorted(names & {'peft', 'diffusers', 'transformers', 'accelerate'}), sorted(own))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == f"[] {sorted(INDEPENDENT)}"


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("import peft.tuners", {"peft.tuners"}),
        ("from diffusers import AutoencoderKL", {"diffusers"}),
        ("from moe_lora import flow", {"moe_lora.flow"}),
        ("from ..tuner.layer import MoELoraLinear", {"moe_lora.tuner.layer"}),
        ("from .. import routing", {"moe_lora.routing"}),
        ("from . import detail", {"moe_lora.losses.detail"}),
        ("def late():\n    import peft", {"peft"}),
    ],
)
def test_the_reader_sees_every_kind_of_import(code: str, imported: set[str]) -> None:
    assert set(imports_of(code, "moe_lora.losses.removal", is_package=False)) == imported
