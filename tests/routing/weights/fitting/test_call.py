from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.routing.model_call import ModelCall
from moe_lora.routing.weights.fitting import fit_to_call


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
        found, grid = fit_to_call(given, ModelCall.read(model, (x,)))
        assert found is given
        assert grid is None
    found, grid = fit_to_call(weights, ModelCall.read(Named(), (torch.zeros(2, 4, 4, 6),)))
    assert grid == (4, 6)
    pixels = weights.view(2, 2, 3, 3).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(found.view(2, 4, 6, 3), pixels)


@pytest.mark.parametrize("shape", [(1, 3), (1, 24, 3)])
def test_weights_of_one_sample_serve_the_batch(make_flux, make_flux_inputs, shape):
    model = make_flux(64).eval()
    model.add_adapter(MoELoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    call, weights = make_flux_inputs(in_channels=64), torch.randn(shape).softmax(-1)
    with torch.no_grad(), moe_lora.route(model, weights.expand(2, *shape[1:])):
        expected = model(**call)[0]
    with moe_lora.route(model, weights.requires_grad_()):
        found = model(**call)[0]
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    assert weights.grad.abs().sum() > 0


@pytest.mark.parametrize("sizes", [[(2, 3), (2, 3)], [(2, 3), (4, 3)]])
def test_weights_for_a_list_of_samples(sizes):
    samples = [torch.randn(4, 1, *size) for size in sizes]
    weights = torch.rand(2, 3)
    one, _ = fit_to_call(weights[:1], ModelCall.read(Named(), (samples,)))
    assert torch.equal(one, weights[:1].expand(2, -1))
    guided, _ = fit_to_call(weights, ModelCall.read(Named(), (samples * 2,)))
    assert torch.equal(guided, weights.repeat(2, 1))
    with pytest.raises(ValueError, match="for the 2 samples"):
        fit_to_call(torch.rand(3, 3), ModelCall.read(Named(), (samples,)))


class Anything(nn.Module):
    def forward(self, *args, **kwargs):
        return args


def test_arguments_of_a_model_that_takes_anything_are_read():
    x = torch.zeros(4, 6, 2)
    call = ModelCall.read(Anything(), (x,), {"timestep": 3})
    assert call.arguments["timestep"] == 3
    assert fit_to_call(torch.rand(1, 3), call)[0].shape == (1, 3)
    assert fit_to_call(torch.rand(1, 3), ModelCall.read(Anything(), (), {"sample": x}))[
        0
    ].shape == (4, 3)


def test_a_signature_is_read_once_and_again_when_forward_is_replaced(monkeypatch):
    class Model(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    from moe_lora.routing.model_call import arguments

    read, inspected = [], arguments.inspect.signature
    monkeypatch.setattr(
        arguments.inspect, "signature", lambda forward: read.append(forward) or inspected(forward)
    )
    for _ in range(3):
        ModelCall.read(Model(), (1,))
    assert len(read) == 1
    monkeypatch.setattr(Model, "forward", lambda self, sample, *, timestep=0: sample)
    assert ModelCall.read(Model(), (1,)).arguments == {"sample": 1}
