"""The public names: `__all__` decides, the reference documents each of them, nothing else shows."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import moe_lora

TOP = {
    "MoELoraConfig",
    "MoELoraModel",
    "MoELoraLinear",
    "Router",
    "RouterInputs",
    "register_router",
    "ThreeExpertRemovalRouter",
    "MaskAwareFeatureExtractor",
    "RemovalLoss",
    "compute_removal_task_loss",
    "extract_mask_info_from_batch",
    "route",
    "router_inputs",
    "set_router_inputs",
    "set_routing_mode",
    "attach_router",
    "routing_stats",
    "current_routing",
    "save_adapter",
    "load_adapter",
    "save_experts",
    "load_experts",
    "export_lora",
    "from_loras",
    "add_expert",
    "remove_expert",
    "rename_expert",
    "train_only",
    "merge",
    "unmerge",
}
SUBMODULES = {
    "ablation",
    "composition",
    "export",
    "families",
    "flow",
    "losses",
    "masks",
    "metrics",
    "planning",
    "plots",
    "routing",
    "schedules",
    "tuner",
}
PUBLIC = [f"moe_lora.{name}" for name in sorted(SUBMODULES)]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def shown(module: ModuleType) -> set[str]:
    """Return the names of a module that a reader takes for public."""
    inner = {name for _, name, _ in pkgutil.iter_modules(getattr(module, "__path__", []))}
    names = {name for name in vars(module) if not name.startswith("_")}
    return names - inner - {"annotations"}


def test_importing_registers_the_method_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, moe_lora, peft.mapping as m;"
        "heavy = {'diffusers', 'matplotlib', 'lpips'} & set(sys.modules);"
        "print('MOE_LORA' in m.PEFT_TYPE_TO_TUNER_MAPPING, sorted(heavy))"
    )
    assert run(code) == "True []"


def test_the_top_has_the_names_of_most_training_scripts() -> None:
    assert set(moe_lora.__all__) == TOP | SUBMODULES
    assert shown(moe_lora) | SUBMODULES == TOP | SUBMODULES
    assert moe_lora.__version__ == importlib.import_module("moe_lora._version").__version__


@pytest.mark.parametrize("name", PUBLIC)
def test_a_submodule_shows_its_public_names_only(name: str) -> None:
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        assert shown(module) <= set(module.__all__)
    for public in module.__all__:
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, public


@pytest.mark.parametrize("name", PUBLIC)
def test_names_at_the_top_are_those_of_the_submodules(name: str) -> None:
    module = importlib.import_module(name)
    for shared in set(module.__all__) & TOP:
        assert getattr(moe_lora, shared) is getattr(module, shared)
