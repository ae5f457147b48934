"""Beside adapters of other methods in one model."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, PeftMixedModel, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import moe_lora


def set_active(model, names):
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)


@pytest.mark.parametrize("ours_first", [False, True])
def test_a_mixture_acts_beside_a_plain_lora(make_case, ours, lora, ours_first):
    case = make_case("mlp")
    model, base = case.make(), case(case.make())
    order = [(lora, "style"), (ours, "removal")]
    for method, name in reversed(order) if ours_first else order:
        inject_adapter_in_model(method.config(["head"]), model, adapter_name=name)
    alone = {}
    for name in ("style", "removal"):
        set_active(model, [name])
        alone[name] = case(model) - base
        assert alone[name].abs().max() > 1e-3
    set_active(model, ["style", "removal"])
    both = base + alone["style"] + alone["removal"]
    torch.testing.assert_close(case(model), both, rtol=1e-4, atol=1e-5)
    moe_lora.merge(model, [1 / 3, 1 / 3, 1 / 3] if ours.name == "moe" else None)
    moe_lora.unmerge(model)
    torch.testing.assert_close(case(model), both, rtol=1e-4, atol=1e-5)


def test_a_mixture_stacks_on_a_peft_model_as_lora_stacks_on_loha(make_case, method):
    case = make_case("mlp")
    loha = get_peft_model(case.make(), LoHaConfig(target_modules=["head"], init_weights=False))
    before = case(loha)
    stacked = get_peft_model(
        loha.base_model.model, method.config(["head"], init_lora_weights=True), "other"
    )
    set_active(stacked, ["default", "other"])
    torch.testing.assert_close(case(stacked), before)


def test_a_name_that_another_method_holds_is_refused(make_case, ours, lora):
    case = make_case("flux")
    model = case.make()
    model.add_adapter(lora.config(case.targets), adapter_name="style")
    before, keys = case(model), set(model.state_dict())
    with pytest.raises(ValueError, match=r"'style' is a PeftType\.LORA adapter"):
        inject_adapter_in_model(ours.config(case.targets), model, adapter_name="style")
    assert model.peft_config["style"].peft_type == "LORA"
    assert set(model.state_dict()) == keys
    assert torch.equal(case(model), before)


def test_a_peft_model_of_lora_refuses_ours_and_the_reverse(make_case, ours, lora):
    case = make_case("mlp")
    for first, second in ((lora, ours), (ours, lora)):
        model = get_peft_model(case.make(), first.config(case.targets))
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("other", second.config(case.targets))
        assert list(model.peft_config) == ["default"]


def test_peft_mixed_models_refuse_ours_before_anything_changes(make_case, ours):
    case = make_case("mlp")
    base = case.make()
    keys = set(base.state_dict())
    with pytest.raises(ValueError, match="MOE_LORA"):
        PeftMixedModel(base, ours.config(case.targets))
    assert set(base.state_dict()) == keys


def test_a_plain_lora_is_saved_and_loaded_beside_ours(make_case, ours, lora, tmp_path):
    case = make_case("attention")
    style = get_peft_model(case.make(), lora.config(["to_k"]))
    style.save_pretrained(tmp_path)
    model = case.make()
    inject_adapter_in_model(ours.config(["to_q"]), model, adapter_name="removal")
    mixture = case(model)
    stacked = PeftModel.from_pretrained(model, tmp_path, adapter_name="style")
    set_active(stacked, ["removal"])
    assert torch.equal(case(stacked), mixture)
    set_active(stacked, ["style"])
    assert torch.equal(case(stacked), case(style.eval()))
