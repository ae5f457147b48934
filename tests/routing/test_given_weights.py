from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.routing.given_weights import fit_to_call


def test_given_weights_are_repeated_with_the_batch(make_flux, make_flux_inputs):
    model = make_flux(64).eval()
    model.add_adapter(MoELoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    call = make_flux_inputs(in_channels=64)
    twice = {k: v.repeat(2, *[1] * (v.ndim - 1)) if len(v) == 2 else v for k, v in call.items()}
    for shape in ((2, 3), (2, 24, 3)):
        weights = torch.randn(shape).softmax(-1).requires_grad_()
        with torch.no_grad(), moe_lora.route(model, weights):
            expected = model(**call)[0]
        with moe_lora.route(model, weights):
            found = model(**twice)[0]
        torch.testing.assert_close(found, expected.repeat(2, 1, 1))
        found.square().mean().backward()
        assert weights.grad.abs().sum() > 0
        three = weights[:1].expand(3, *shape[1:])
        with moe_lora.route(model, three), pytest.raises(ValueError, match=r"4 samples .* got 3"):
            model(**twice)


class Tokens(nn.Module):
    def forward(self, tokens, more=None):
        return tokens


class Named(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


def test_weights_that_fit_or_whose_latents_are_unknown_stay_what_they_are():
    weights, x = torch.rand(2, 6, 3), torch.zeros(2, 6, 4)
    for model, given in (
        (Named(), weights),
        (Named(), weights[:, 0]),
        (Named(), weights[0, 0]),
        (Tokens(), weights[:1]),
        (Tokens(), torch.rand(5, 3)),
    ):
        found, grid = fit_to_call(given, model, (x,), {})
        assert found is given
        assert grid is None
    found, grid = fit_to_call(weights, Named(), (), {"hidden_states": torch.zeros(2, 4, 4, 6)})
    assert grid == (2, 3)
