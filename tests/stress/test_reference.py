"""The reference itself, against closed forms."""

from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from stress.reference import Delta, Mixture, Reference, delta_of, layer_path, mixture_of
from torch import nn

from moe_lora import MoELoraConfig


def test_a_linear_layer_under_two_experts_is_this_number():
    base = nn.Sequential(nn.Linear(2, 1, bias=False))
    base[0].weight.data = torch.tensor([[1.0, 1.0]])
    # A_0 = [1 0], B_0 = [10]; A_1 = [0 1], B_1 = [100]; s = 2.
    experts = {"0": (torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([[[10.0], [100.0]]]))}
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    x = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    found = Reference(base)([Mixture(experts, weights, 2.0)], x)
    # 7 + 2 (0.5 · 30 + 0.5 · 400); 11 + 2 · 50.
    assert found.tolist() == [[437.0], [111.0]]


def test_token_weights_belong_to_one_token():
    base = nn.Sequential(nn.Linear(1, 1, bias=False))
    base[0].weight.data.zero_()
    experts = {"0": (torch.ones(2, 1, 1), torch.tensor([[[1.0], [10.0]]]))}
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]])
    found = Reference(base)([Mixture(experts, weights, 1.0)], torch.ones(1, 3, 1))
    assert found.flatten().tolist() == [1.0, 10.0, 5.5]


@pytest.mark.parametrize("kwargs", [{}, {"stride": 2, "padding": 1}])
def test_a_convolution_under_fixed_weights_is_one_with_another_weight(kwargs):
    base = nn.Sequential(nn.Conv2d(2, 3, 3, **kwargs))
    A, B = torch.randn(2, 4, 2, 3, 3), torch.randn(3, 2, 4)
    weights, x = torch.tensor([0.3, 0.7]), torch.randn(2, 2, 6, 5)
    found = Reference(base)([Mixture({"0": (A, B)}, weights, 1.5)], x)
    weight = base[0].weight + 1.5 * torch.einsum("e,oer,eridk->oidk", weights, B, A)
    expected = base[0]._conv_forward(x, weight, base[0].bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False),
        LoHaConfig(r=2, alpha=3, target_modules=["0"], init_weights=False),
    ],
)
def test_a_plain_adapter_is_what_peft_computes(config):
    base, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 5, 4)
    reference = Reference(base)
    model = get_peft_model(base, config)
    assert not torch.allclose(model(x), reference([], x))
    torch.testing.assert_close(reference([delta_of(model, "default")], x), model(x))


def test_a_uniform_mixture_is_what_a_stock_lora_of_rank_e_times_r_computes(mlp):
    reference = Reference(mlp)
    model = get_peft_model(
        mlp, MoELoraConfig(r=2, lora_alpha=3, target_modules=["first"], init_lora_weights=False)
    )
    term = mixture_of(model, torch.full((3,), 1 / 3))
    ((path, (A, B)),) = term.experts.items()
    delta = Delta({path: B.flatten(1) @ A.flatten(0, 1) * 1.5 / 3})
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(reference([term], x), reference([delta], x))


def test_the_base_is_left_alone_and_unknown_layers_are_an_error(mlp):
    reference, x = Reference(mlp), torch.randn(2, 6)
    term = Delta({"first": torch.ones(10, 6)})
    assert not torch.allclose(reference([term], x), mlp(x))
    assert torch.equal(reference([], x), mlp(x))
    with pytest.raises(AssertionError, match="no such layers"):
        reference([Delta({"third": torch.ones(10, 6)})], x)


def test_paths_are_those_of_the_base_model():
    assert layer_path("base_model.model.a.0.base_layer.base_layer") == "a.0"
    assert layer_path("_orig_mod.a._checkpoint_wrapped_module.b") == "a.b"
