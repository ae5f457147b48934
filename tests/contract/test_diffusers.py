"""diffusers' own adapter calls on its models: ours ends where stock LoRA ends."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import get_layer_status, inject_adapter_in_model

import moe_lora

pytestmark = pytest.mark.slow


def add(name, **kwargs):
    return lambda m, c, k: m.add_adapter(k.config(c.targets, **kwargs), adapter_name=name)


STEPS = {
    "add a": add("a"),
    "add b": add("b", r=2),
    "add conv": lambda m, c, k: m.add_adapter(k.config(["no_such_layer"]), adapter_name="c"),
    "set a": lambda m, c, k: m.set_adapter("a"),
    "set both": lambda m, c, k: m.set_adapter(["a", "b"]),
    "set unknown": lambda m, c, k: m.set_adapter("unknown"),
    "weigh both": lambda m, c, k: m.set_adapters(["a", "b"], weights=[0.5, 2.0]),
    "weigh a": lambda m, c, k: m.set_adapters("a", weights=0.3),
    "weigh none": lambda m, c, k: m.set_adapters("a", weights=0.0),
    "disable": lambda m, c, k: m.disable_adapters(),
    "enable": lambda m, c, k: m.enable_adapters(),
    "disable lora": lambda m, c, k: m.disable_lora(),
    "enable lora": lambda m, c, k: m.enable_lora(),
    "delete a": lambda m, c, k: m.delete_adapters("a"),
    "delete both": lambda m, c, k: m.delete_adapters(["a", "b"]),
    "fuse": lambda m, c, k: m.fuse_lora(),
    "fuse half": lambda m, c, k: m.fuse_lora(lora_scale=0.5, safe_fusing=True),
    "fuse b": lambda m, c, k: m.fuse_lora(adapter_names=["b"]),
    "unfuse": lambda m, c, k: m.unfuse_lora(),
    "unload": lambda m, c, k: m.unload_lora(),
    "call": lambda m, c, k: c(m),
    "active": lambda m, c, k: m.active_adapters(),
}

SCRIPTS = [
    "active, add a, call, active",
    "add a, add a, add b, active, set a, active",
    "add a, add b, set both, call, set unknown",
    "add a, add b, weigh both, weigh a, weigh none",
    "add a, disable, call, enable, disable lora, enable lora",
    "add a, disable, add b, call, enable, delete a, active",
    "add a, add b, set both, delete a, call, delete both, call",
    "add a, delete a, add b, call, add a, active",
    "add a, fuse, call, unfuse, call",
    "add a, fuse half, call, unfuse, weigh a",
    "add a, add b, fuse b, call, unfuse",
    "add a, fuse, delete a, unfuse, call",
    "add a, unload, call, add b, call, unload",
    "add a, add b, fuse, unload, call, add a",
]


def outcome(step, model, case, method):
    try:
        found = step(model, case, method)
    except Exception as error:
        return type(error).__name__
    return found if isinstance(found, list | str) else "done"


def state(model, case, base):
    kept = vars(model)
    found = {
        "peft_config": sorted(kept.get("peft_config", {})),
        "has config": "peft_config" in kept,
        "loaded flag": kept.get("_hf_peft_config_loaded"),
        "is base": bool(torch.allclose(case(model), base, rtol=1e-4, atol=1e-5)),
        "hollow": sorted(n for n in model.state_dict() if "lora" not in n),
        "trains": {
            n.split(".lora_")[0].split(".moe_lora")[0]
            for n, p in model.named_parameters()
            if p.requires_grad and "router" not in n
        },
    }
    if any("lora" in name for name, _ in model.named_modules()):
        found["layers"] = [
            (s.name, s.enabled, s.active_adapters, s.merged_adapters, s.requires_grad)
            for s in get_layer_status(model)
            if "moe_router" not in s.name
        ]
    return found


@pytest.mark.parametrize(
    ("name", "script"),
    [("flux", script) for script in SCRIPTS] + [("unet", script) for script in SCRIPTS[-4:]],
)
def test_ours_ends_where_lora_ends(make_case, ours, lora, name, script):
    case = make_case(name)
    base = case(case.make())
    models = [case.make(), case.make()]
    for step in script.split(", "):
        found = []
        for method, model in zip((lora, ours), models, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = outcome(STEPS[step], model, case, method)
                found.append({"outcome": done, **state(model, case, base)})
        assert found[1] == found[0], step


def test_weights_of_adapters_scale_their_part(make_case, ours):
    case = make_case("flux")
    model = case.make()
    model.add_adapter(ours.config(["proj_out"]), adapter_name="a")
    model.add_adapter(ours.config(["proj_out"]), adapter_name="b")
    layer = model.proj_out
    x = torch.rand(2, layer.in_features)
    base = layer.base_layer(x)
    parts = {}

    def out():
        with moe_lora.route(model, torch.tensor([0.5, 0.3, 0.2])):  # a layer by itself
            return layer(x)

    for name in "ab":
        model.set_adapter(name)
        parts[name] = out() - base
    model.set_adapters(["a", "b"], weights=[0.25, 3.0])
    expected = base + 0.25 * parts["a"] + 3.0 * parts["b"]
    torch.testing.assert_close(out(), expected, rtol=1e-4, atol=1e-5)
    model.set_adapters(["a", "b"])
    torch.testing.assert_close(out(), base + parts["a"] + parts["b"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("called", [False, True])
def test_an_unloaded_model_is_the_base_model_and_asks_no_router(make_case, ours, called):
    case = make_case("flux")
    base, model = case.make(), case.make()
    model.add_adapter(ours.config(case.targets, router="three_expert_removal"))
    model.unload_lora()
    assert model.state_dict().keys() == base.state_dict().keys()
    if called:
        assert torch.equal(case(model), case(base))
        assert not model._forward_pre_hooks
    inject_adapter_in_model(ours.config(case.targets), model)
    assert len(model._forward_pre_hooks) == 1
    assert model.moe_router.active_adapters == ["default"]
    case(model)
    assert (moe_lora.current_routing(model) is not None) == ("router" in ours.fixed)


@pytest.mark.parametrize("again", [False, True])
def test_a_failed_injection_can_be_repeated(make_case, ours, again):
    case = make_case("flux")
    model = case.make()
    if again:
        model.add_adapter(ours.config(case.targets), adapter_name="first")
    before, keys = case(model), set(model.state_dict())
    with pytest.raises(TypeError, match="norm1'"):
        model.add_adapter(ours.config([*case.targets, "norm1"]))
    assert set(model.state_dict()) == keys
    assert torch.equal(case(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter(ours.config(case.targets))
    assert not torch.equal(case(model), before)
