from __future__ import annotations

import pickle

import pytest
import torch

import moe_lora
from moe_lora import MoELoraConfig, masks
from moe_lora.routing.model_call import MaskCache, mask_cache


@pytest.fixture
def analyzed(monkeypatch):
    calls = []

    def analyze(mask, image=None):
        calls.append(mask)
        return masks.analyze(mask, image)

    monkeypatch.setattr(mask_cache, "analyze", analyze)
    return calls


def test_a_mask_is_analyzed_when_it_changes(analyzed):
    cache, mask = MaskCache(), torch.zeros(2, 1, 16, 16)
    mask[0, :, 2:6, 3:9] = 1
    first = cache.analyze(mask)
    assert cache.analyze(mask.clone()) is first
    assert torch.equal(first.area_ratio, masks.analyze(mask).area_ratio)
    changes = [mask[:1], mask.double(), mask.flip(0), mask]
    for number, other in enumerate(changes, start=2):
        found = cache.analyze(other)
        assert len(analyzed) == number
        assert torch.equal(found.mask, masks.analyze(other).mask)
    mask[0, 0, 0, 0] = 1  # in place: the cached copy must not change with it
    assert cache.analyze(mask).area_ratio[0] == masks.analyze(mask).area_ratio[0]
    assert len(analyzed) == 6


def test_an_analysis_from_inference_mode_is_usable_in_training():
    cache, mask = MaskCache(), torch.ones(1, 1, 16, 16)
    with torch.inference_mode():
        cache.analyze(mask)
    features = cache.analyze(mask).features()
    weight = torch.ones(features.shape[-1], requires_grad=True)
    (features * weight).sum().backward()
    assert weight.grad is not None


def test_a_copy_has_an_empty_cache(analyzed):
    cache, mask = MaskCache(), torch.ones(1, 1, 16, 16)
    cache.analyze(mask)
    pickle.loads(pickle.dumps(cache)).analyze(mask)
    assert len(analyzed) == 2


def test_a_denoising_loop_analyzes_its_mask_once(analyzed, make_flux, make_flux_inputs):
    model = make_flux().eval()
    model.add_adapter(MoELoraConfig(r=2, target_modules=["to_q"], router="three_expert_removal"))
    inputs, other = make_flux_inputs(), make_flux_inputs()
    other["hidden_states"][..., 128:] = 1 - other["hidden_states"][..., 128:]
    weights = []
    for step in (inputs, {**inputs, "timestep": torch.tensor([0.5, 0.5])}, other):
        model(**step)
        weights.append(moe_lora.current_routing(model).weights)
    assert len(analyzed) == 2
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
