"""Experts with non-zero weights under `top_k`, and the gradients of the weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import nn

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.routing.weights.selection import expert_indices

E = 4


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    k=st.integers(1, E),
    kept=st.integers(0, E),
    scale=st.sampled_from([-1e-30, -1.0, 1.0, 1e30]),
    seed=st.integers(0, 2**31),
)
def test_all_weights_that_are_not_zero_count(k, kept, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(5, E, generator=generator) * scale
    order = torch.rand(5, E, generator=generator).argsort(-1)
    weights = weights.scatter(-1, order[:, min(k, kept) :], 0.0)
    indices = expert_indices(weights, k)
    assert indices.shape == (5, k)
    for row, found in zip(weights, indices.tolist(), strict=True):
        assert len(set(found)) == k
        assert set(row.nonzero().flatten().tolist()) <= set(found)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 7, 6)),
    "of an image": (lambda: nn.Linear(6, 5), (2, 3, 4, 6)),
    "modulation": (lambda: nn.Linear(6, 5), (2, 6)),
    "convolution": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 4, 3)),
}
SIGNED = {
    "negative": [[0.0, -0.7, 1.5, 0.0], [-0.2, 0.0, 0.0, -1.0]],
    "fewer than k": [[0.0, 0.0, 1.5, 0.0], [0.0, -0.3, 0.0, 0.0]],
    "none": [[0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]],
}


@pytest.mark.parametrize("weights", SIGNED.values(), ids=SIGNED)
@pytest.mark.parametrize("kind", LAYERS)
def test_top_k_computes_the_full_mixture_and_trains_the_experts_with_weight(kind, weights):
    make, shape = LAYERS[kind]
    config = MoELoraConfig(r=2, num_experts=E, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(make()), config)
    x, w = torch.randn(shape), torch.tensor(weights).requires_grad_()
    counts = w != 0
    results = []
    for k in (None, 2):
        with moe_lora.route(model, w, top_k=k):
            out = model(x)
        learned = [w, *(p for p in model.parameters() if p.requires_grad)]
        results.append([out, *torch.autograd.grad(out.square().sum(), learned)])
    assert (results[0][1] != 0).all()
    results[0][1] = results[0][1] * counts
    for found, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ((results[1][1] != 0) == counts).all()
    _, _, of_A, of_B = results[1]
    used = counts.any(0)
    assert ((of_A.flatten(1) != 0).any(-1) == used).all()
    assert ((of_B != 0).any(0).any(-1) == used).all()
