from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_lora import RouterInputs
from moe_lora.families import UNKNOWN, family_of
from moe_lora.routing.inputs import GivenInputs
from moe_lora.routing.model_call import ModelCall

TOKENS = torch.zeros(2, 6, 4)


def inputs(*timesteps, counted=None, **more):
    return RouterInputs(TOKENS, timestep=torch.tensor(timesteps), timestep_range=counted, **more)


def test_sigma_is_what_is_noise_in_every_counting():
    assert inputs(0.25, 1.0, counted=(0, 1)).sigma.tolist() == [0.25, 1.0]
    assert inputs(250.0, 0.5, counted=(0, 1000)).sigma.tolist() == pytest.approx([0.25, 0.0005])
    assert inputs(250, 999, counted=(0, 1000)).sigma.tolist() == pytest.approx([0.25, 0.999])
    assert inputs(0.25, 1.0, counted=(1, 0)).sigma.tolist() == [0.75, 0.0]


@pytest.mark.parametrize("timesteps", [(0.25, 1.0), (0.5, 900.0), (1, 0), (250, 999)])
def test_an_unknown_counting_is_never_guessed(timesteps):
    expected = r"known `timestep_range`, .* timestep_range=\(clean, noise\)\): \(0, 1\) for"
    with pytest.raises(ValueError, match=expected):
        _ = inputs(*timesteps).sigma
    read = ModelCall.read(named("Mine"), (TOKENS, torch.tensor(timesteps)))
    with pytest.raises(ValueError, match=expected):
        _ = read.router_inputs().sigma
    given = read.router_inputs(GivenInputs(timestep_range=(0.0, 1000.0)))
    assert given.sigma.tolist() == pytest.approx([t / 1000 for t in timesteps])


def test_no_samples_have_no_sigma():
    empty = RouterInputs(TOKENS[:0], timestep=torch.zeros(0), timestep_range=(0, 1))
    assert empty.sigma.shape == (0,)


def test_a_sigma_that_cannot_be_known_raises():
    with pytest.raises(ValueError, match=r"called with a timestep, .* got the arguments \['x'\]"):
        _ = RouterInputs(TOKENS, model_inputs={"x": TOKENS}).sigma
    with pytest.raises(ValueError, match=r"from 0 \(clean\) to 1 \(noise\), .* from 0.5 to 500"):
        _ = inputs(0.5, 500.0, counted=(0, 1)).sigma
    with pytest.raises(ValueError, match="from -1 to 2"):
        _ = inputs(-1.0, 2.0, counted=(1, 0)).sigma


def named(name):
    class Model(nn.Module):
        def forward(self, hidden_states, timestep):
            return hidden_states

    return type(name, (Model,), {})()


@pytest.mark.parametrize(
    ("name", "timestep", "sigma"),
    [
        ("FluxTransformer2DModel", torch.tensor([0.25, 0.5]), [0.25, 0.5]),
        ("SD3Transformer2DModel", torch.tensor([250.0, 0.5]), [0.25, 0.0005]),
        ("UNet2DConditionModel", 250, [0.25, 0.25]),
        ("UNet2DConditionModel", torch.tensor([1, 0]), [0.001, 0.0]),
        ("ZImageTransformer2DModel", torch.tensor([0.25, 0.5]), [0.75, 0.5]),
    ],
)
def test_a_call_is_read_in_the_counting_of_its_model(name, timestep, sigma):
    read = ModelCall.read(named(name), (TOKENS, timestep)).router_inputs()
    assert read.sigma.tolist() == pytest.approx(sigma)
    assert read.to("cpu").timestep_range == read.timestep_range


def test_a_subclass_counts_as_its_base():
    base = type("FluxTransformer2DModel", (nn.Module,), {})
    assert family_of(type("Mine", (base,), {})()).timestep_range == (0.0, 1.0)
    assert family_of(nn.Linear(1, 1)) is UNKNOWN


def test_a_router_may_insist_on_the_grid():
    assert RouterInputs(TOKENS, grid_size=(2, 3)).require_grid_size() == (2, 3)
    with pytest.raises(ValueError, match=r"`grid_size`, .*set_router_inputs\(model, mask=mask"):
        RouterInputs(TOKENS).require_grid_size()
    with pytest.raises(ValueError, match=r"to have 6 tokens, but got \(2, 4\)"):
        RouterInputs(TOKENS, grid_size=(2, 4)).require_grid_size()
