"""Merging into the base weights, out of them, and for good: on every model, beside stock LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_lora

pytestmark = pytest.mark.slow


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def base_weights(model):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora" not in name
    }


def test_merged_weights_compute_what_the_adapter_computed(case, method):
    model = get_peft_model(case.make(), method.config(case.targets))
    expected, before = case(model), base_weights(model)
    model.merge_adapter()
    close(case(model), expected)
    changed = [n for n, w in base_weights(model).items() if not torch.equal(w, before[n])]
    assert changed
    assert all(name.endswith("base_layer.weight") for name in changed)
    model.unmerge_adapter()
    close(case(model), expected)
    for name, weight in base_weights(model).items():
        close(weight, before[name])


def test_a_merged_model_asks_no_router(make_case, ours):
    case = make_case("flux")
    model = get_peft_model(case.make(), ours.config(case.targets, router="three_expert_removal"))
    moe_lora.merge(model, [0.2, 0.3, 0.5])
    case(model)  # without a mask, which this router would need
    moe_lora.unmerge(model)
    with pytest.raises(ValueError, match="needs a mask"):
        case(model)


def test_two_adapters_merge_into_their_sum(case, method):
    model = get_peft_model(case.make(), method.config(case.targets))
    model.add_adapter("other", method.config(case.targets[:1], r=2))
    model.base_model.set_adapter(["default", "other"])
    expected = case(model)
    model.merge_adapter()
    close(case(model), expected)
    model.unmerge_adapter()
    model.merge_adapter(["other"])
    model.set_adapter("other")
    merged = case(model)
    model.unmerge_adapter()
    close(case(model), merged)


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "merge"])
def test_a_safe_merge_that_meets_nan_changes_no_layer(case, ours, how):
    model = get_peft_model(case.make(), ours.config(case.targets))
    expected, keys = case(model), set(model.state_dict())
    ours.break_adapter(model)
    before = base_weights(model)
    merge = {
        "merge": lambda: moe_lora.merge(model, [0.2, 0.3, 0.5], safe_merge=True),
        "merge_adapter": lambda: model.merge_adapter(safe_merge=True),
        "merge_and_unload": lambda: model.merge_and_unload(safe_merge=True),
    }[how]
    with pytest.raises(ValueError, match="adapter 'default' produces NaN or inf"):
        merge()
    assert all(torch.equal(w, before[n]) for n, w in base_weights(model).items())
    assert set(model.state_dict()) == keys
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_()
    assert case(model).isfinite().all()
    assert case(model).shape == expected.shape
    model.merge_adapter(safe_merge=True)


def test_merging_one_of_two_adapters_that_depends_on_its_input_changes_nothing(make_case, ours):
    case = make_case("flux")
    model = get_peft_model(case.make(), ours.config(case.targets))
    model.add_adapter("other", ours.config(case.targets, router="three_expert_removal"))
    before = base_weights(model)
    with pytest.raises(ValueError, match="ThreeExpertRemovalRouter computes them"):
        model.merge_adapter(["default", "other"])
    assert all(torch.equal(w, before[n]) for n, w in base_weights(model).items())


@pytest.mark.parametrize("merged", [True, False])
def test_unloading_leaves_a_plain_model(case, method, merged):
    base = case.make()
    model = get_peft_model(case.make(), method.config(case.targets, modules_to_save=[case.saved]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(0.5)
    adapted = case(model)
    plain = model.merge_and_unload() if merged else model.unload()
    assert type(plain) is type(base)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert {type(m) for m in plain.modules()} == {type(m) for m in base.modules()}
    assert not plain._forward_pre_hooks
    assert not hasattr(plain, "peft_config")
    if merged:
        close(case(plain), adapted)
    again = get_peft_model(plain, method.config(case.targets, init_lora_weights=True))
    close(case(again), case(plain))


def test_a_half_precision_base_stays_in_half_precision(case, method):
    model = get_peft_model(case.make().bfloat16(), method.config(case.targets))
    adapters = {p.dtype for n, p in model.named_parameters() if "lora" in n}
    assert adapters == {torch.float32}
    plain = model.merge_and_unload(safe_merge=True)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
