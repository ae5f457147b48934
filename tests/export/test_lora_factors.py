from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.export.expert_table import LayerExperts, mix, table_of_model
from moe_lora.export.lora_factors import Factors


def experts(dtype=torch.float64, kernel=()):
    return LayerExperts(
        torch.randn(3, 2, 5, *kernel, dtype=dtype), torch.randn(7, 3, 2, dtype=dtype), 2.5
    )


@pytest.mark.parametrize("kernel", [(), (3, 2)])
def test_mix_is_the_weighted_sum_of_the_experts(kernel):
    A, B, scaling = experts(kernel=kernel)
    weights = torch.tensor([0.5, 0.0, -0.25], dtype=torch.float64)
    factors = mix(LayerExperts(A, B, scaling), weights)
    expected = sum(
        scaling * weights[e] * torch.einsum("or,r...->o...", B[:, e], A[e]) for e in range(3)
    )
    assert factors.rank == 4  # the expert of weight 0 is not there
    torch.testing.assert_close(factors.delta(), expected)
    assert factors.norm() == pytest.approx(float(expected.norm()))


def test_mix_keeps_the_dtype_of_the_experts():
    A, B, scaling = experts(torch.bfloat16)
    factors = mix(LayerExperts(A, B, scaling), torch.tensor([0.3, 0.3, 0.4]))
    assert factors.down.dtype == factors.up.dtype == torch.bfloat16
    assert factors.delta().dtype == torch.float32


def test_the_norm_of_nothing_is_zero():
    assert Factors(torch.ones(2, 3), torch.zeros(4, 2)).norm() == 0.0


def test_a_table_mixes_as_the_model_merges(make_mlp):
    config = MoELoraConfig(target_modules=["first", "second"], r=3, init_lora_weights=False)
    model = get_peft_model(make_mlp(), config)
    weights = torch.tensor([0.2, 0.5, 0.3])
    lora = table_of_model(model).mixed(weights)
    before = {path: model.base_model.model.get_submodule(path).weight.clone() for path in lora}
    moe_lora.merge(model, weights)
    for path, factors in lora.items():
        merged = model.base_model.model.get_submodule(path).weight
        torch.testing.assert_close(before[path] + factors.delta(), merged)


def test_one_expert_of_a_table_is_its_own_product(make_mlp):
    config = MoELoraConfig(target_modules=["first"], r=3, lora_alpha=6, init_lora_weights=False)
    model = get_peft_model(make_mlp(), config)
    held = model.base_model.model.first.moe_lora_experts["default"]
    down, up = table_of_model(model).expert(1)["first"]
    torch.testing.assert_close(down, held.lora_A[1].detach())
    torch.testing.assert_close(up, 2 * held.lora_B[:, 1].detach())
