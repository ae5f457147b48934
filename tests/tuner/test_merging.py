from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_lora
from moe_lora import MoELoraConfig


def adapted(make_flux, targets, **kwargs):
    config = MoELoraConfig(r=4, target_modules=targets, init_lora_weights=False, **kwargs)
    return get_peft_model(make_flux(), config).eval()


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("router", [None, "three_expert_removal"])
def test_merging_given_weights_equals_the_mixture_and_unmerging_restores(
    make_flux, make_flux_inputs, flux_targets, router
):
    model, inputs = adapted(make_flux, flux_targets, router=router), make_flux_inputs()
    base = make_flux()(**inputs)[0]
    weights = torch.tensor([0.6, 0.3, 0.1])
    with moe_lora.route(model, weights):
        expected = model(**inputs)[0]
    moe_lora.merge(model, weights)
    assert relative_error(model(**inputs)[0], expected) < 1e-5
    moe_lora.unmerge(model)
    with model.disable_adapter():
        assert relative_error(model(**inputs)[0], base) < 1e-5
    with moe_lora.route(model, weights):
        assert relative_error(model(**inputs)[0], expected) < 1e-5


def test_peft_merges_the_uniform_mixture(make_flux, make_flux_inputs, flux_targets):
    model = adapted(make_flux, flux_targets, router="three_expert_removal")
    inputs = make_flux_inputs()
    moe_lora.set_routing_mode(model, "uniform")
    expected = model(**inputs)[0]
    merged = model.merge_and_unload(safe_merge=True)
    assert relative_error(merged(**inputs)[0], expected) < 1e-5
    assert merged.state_dict().keys() == make_flux().state_dict().keys()


def test_a_fixed_router_merges_as_it_is(make_flux, make_flux_inputs, flux_targets):
    model = adapted(
        make_flux, flux_targets, router="fixed", router_kwargs={"weights": [0.2, 0.5, 0.3]}
    )
    expected = model(**make_flux_inputs())[0]
    merged = model.merge_and_unload()
    assert relative_error(merged(**make_flux_inputs())[0], expected) < 1e-5


def test_merging_an_input_dependent_mixture_raises_and_changes_nothing(
    make_flux, make_flux_inputs, flux_targets
):
    model = adapted(make_flux, flux_targets, router="three_expert_removal")
    expected = model(**make_flux_inputs())[0]
    for merge in (model.merge_adapter, lambda: moe_lora.merge(model)):
        with pytest.raises(ValueError, match="ThreeExpertRemovalRouter computes them from the"):
            merge()
    assert torch.equal(model(**make_flux_inputs())[0], expected)


def test_weights_of_another_shape_raise(make_flux, flux_targets):
    model = adapted(make_flux, flux_targets)
    with pytest.raises(ValueError, match=r"shape \(E,\), but got \(2, 3\)"):
        moe_lora.merge(model, torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"E=3 for adapter .default., but got \(2,\)"):
        moe_lora.merge(model, [0.5, 0.5])


def test_safe_merge_refuses_nan_before_the_weight_changes(make_mlp):
    model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
    layer = model.base_model.model.first
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.moe_lora_experts["default"].lora_B[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        moe_lora.merge(model, safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_keeps_a_bfloat16_base(make_mlp):
    config = MoELoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    model = get_peft_model(make_mlp().bfloat16(), config)
    x = torch.rand(2, 6).bfloat16()
    expected = model(x)
    moe_lora.merge(model)
    assert model.base_model.model.first.base_layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model(x), expected, rtol=5e-2, atol=5e-2)
