"""Whatever sequence of PEFT's calls: ours ends in the state in which stock LoRA ends."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_layer_status, get_model_status, get_peft_model

pytestmark = pytest.mark.slow


def nested(inner):
    def run(model, case, method):
        with model.disable_adapter():
            for step in inner:
                STEPS[step](model, case, method)

    return run


def add(name, **kwargs):
    def run(model, case, method):
        model.add_adapter(name, method.config(case.targets, **kwargs))

    return run


def add_elsewhere(model, case, method):
    model.add_adapter("other", method.config([case.saved], modules_to_save=None))


STEPS = {
    "add other": add("other"),
    "add frozen other": add("other", inference_mode=True),
    "add elsewhere": add_elsewhere,
    "add default": add("default"),
    "set other": lambda m, c, k: m.set_adapter("other"),
    "set default": lambda m, c, k: m.set_adapter("default"),
    "set default frozen": lambda m, c, k: m.set_adapter("default", inference_mode=True),
    "set both": lambda m, c, k: m.base_model.set_adapter(["default", "other"]),
    "set unknown": lambda m, c, k: m.set_adapter("unknown"),
    "disable": lambda m, c, k: m.base_model.disable_adapter_layers(),
    "enable": lambda m, c, k: m.base_model.enable_adapter_layers(),
    "call": lambda m, c, k: c(m),
    "delete default": lambda m, c, k: m.delete_adapter("default"),
    "delete other": lambda m, c, k: m.delete_adapter("other"),
    "grad other": lambda m, c, k: m.set_requires_grad("other"),
    "no grad default": lambda m, c, k: m.set_requires_grad("default", requires_grad=False),
    "merge": lambda m, c, k: m.merge_adapter(),
    "merge other": lambda m, c, k: m.merge_adapter(["other"]),
    "merge both": lambda m, c, k: m.merge_adapter(["default", "other"], safe_merge=True),
    "unmerge": lambda m, c, k: m.unmerge_adapter(),
    "break": lambda m, c, k: k.break_adapter(m),
    "safe merge": lambda m, c, k: m.merge_adapter(safe_merge=True),
    "disabled call": nested(["call"]),
    "twice disabled call": lambda m, c, k: nested(["disabled call", "call"])(m, c, k),
}

SCRIPTS = [
    "add other, set other, set default",
    "add other, set both, call, set default",
    "add other, set both, delete default",
    "add other, set both, delete other, call",
    "add other, delete default, call",
    "add other, set other, delete other, call",
    "delete default, call",
    "delete default, add other, set other, call",
    "delete other",
    "add default",
    "set unknown",
    "add elsewhere, set other, call, set default",
    "add elsewhere, set both, call, delete default, call",
    "add elsewhere, delete default, call",
    "add frozen other, set other, set default",
    "set default frozen, add other, set other",
    "set default frozen, add frozen other",
    "no grad default, add other, grad other",
    "no grad default, disable, enable",
    "disable, add other, enable, set other, disable, call",
    "disable, set default, call, enable",
    "disabled call, twice disabled call, call",
    "merge, merge, call, unmerge, unmerge, call",
    "merge, disabled call, call",
    "merge, add other, merge other, call, unmerge, call",
    "add other, merge both, call, unmerge",
    "merge, delete default, unmerge, delete default",
    "merge, set default, call",
    "add other, merge, set other, call",
]

LONG_SCRIPTS = [
    "add other, set both, disabled call, merge, unmerge, delete default, merge, delete other",
    "add elsewhere, set other, merge, call, unmerge, set default, delete other, safe merge",
]


def outcome(step, model, case, method):
    try:
        step(model, case, method)
    except Exception as error:
        return type(error).__name__
    return "done"


def state(model, case, base):
    # Of the tuner, not of the PeftModel, which has no status without an active adapter.
    status = get_model_status(model.base_model)
    layers = [
        layer for layer in get_layer_status(model.base_model) if "moe_router" not in layer.name
    ]
    found = {
        name: getattr(status, name)
        for name in (
            "enabled",
            "active_adapters",
            "merged_adapters",
            "requires_grad",
            "available_adapters",
            "devices",
            "quantization_backend",
        )
    }
    found["layers"] = [
        (layer.name, layer.enabled, list(layer.active_adapters), list(layer.merged_adapters))
        for layer in layers
    ]
    found["peft_types"] = sorted(status.peft_types)
    found["training"] = model.training
    found["as base"] = equals(model, case, base)
    return found


def equals(model, case, base):
    try:
        return bool(torch.allclose(case(model), base, rtol=1e-4, atol=1e-5))
    except Exception as error:
        return type(error).__name__


def compare(case, methods, script):
    base = case(case.make())
    models = [get_peft_model(case.make(), method.config(case.targets)) for method in methods]
    for step in script.split(", "):
        found = []
        for method, model in zip(methods, models, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = outcome(STEPS[step], model, case, method)
                found.append({"outcome": done, **state(model, case, base)})
        assert found[1] == found[0], step


@pytest.mark.parametrize("script", SCRIPTS)
def test_ours_ends_where_lora_ends(make_case, ours, lora, script):
    compare(make_case("attention"), (lora, ours), script)


@pytest.mark.parametrize("script", LONG_SCRIPTS)
def test_ours_ends_where_lora_ends_on_every_model(case, ours, lora, script):
    compare(case, (lora, ours), script)
