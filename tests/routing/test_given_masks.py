"""Masks that are given or carried: taken as they were, checked once, never kept with a graph."""

from __future__ import annotations

import pytest
import torch

import moe_lora
from moe_lora import MoELoraConfig, losses, masks
from moe_lora.masks import validation

ROUTERS = ["three_expert_removal", "token_removal"]


def box(batch=2):
    mask = torch.zeros(batch, 1, 64, 96)
    mask[..., 8:30, 8:40] = 1
    return mask


def routed(make_flux, router="three_expert_removal", channels=384, **kwargs):
    model = make_flux(channels).eval()
    model.add_adapter(
        MoELoraConfig(
            r=2,
            target_modules=["to_q"],
            router=router,
            router_kwargs=kwargs,
            init_lora_weights=False,
        )
    )
    return model


def weights_of(model, call):
    with torch.no_grad():
        model(**call)
    return moe_lora.current_routing(model).weights


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("how", ["mask", "mask and image", "mask_info"])
def test_changes_in_place_after_giving_have_no_effect(make_flux, make_flux_inputs, router, how):
    model, call = routed(make_flux, router, 64), make_flux_inputs(in_channels=64)
    mask, image = box(), torch.rand(2, 3, 64, 96)
    info = masks.analyze(mask, image)
    given = {
        "mask": {"mask": mask},
        "mask and image": {"mask": mask, "image": image},
        "mask_info": {"mask_info": info},
    }[how]
    moe_lora.set_router_inputs(model, **given)
    expected = weights_of(model, call)
    mask[..., 32:] = 1
    image.zero_()
    for value in vars(info).values():
        value.zero_()
    assert torch.equal(weights_of(model, call), expected)
    moe_lora.set_router_inputs(model, **given)
    assert not torch.equal(weights_of(model, call), expected)


def test_an_analysis_shares_no_memory_with_its_mask():
    mask, image = box(), torch.rand(2, 3, 64, 96)
    info = masks.analyze(mask, image, latent_size=(64, 96))
    kept = info.copy()
    mask.fill_(1)
    image.zero_()
    for name, value in vars(kept).items():
        assert torch.equal(getattr(info, name), value), name


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("given", [True, False])
def test_gradients_to_the_latents_come_twice(make_flux, make_flux_inputs, router, given):
    channels = 64 if given else 384
    model, call = routed(make_flux, router, channels), make_flux_inputs(in_channels=channels)
    if given:
        moe_lora.set_router_inputs(model, mask=box().requires_grad_())
    latents = call["hidden_states"].requires_grad_()
    found = []
    for _ in range(3):
        latents.grad = None
        model(**call)[0].square().mean().backward()
        found.append(latents.grad)
        weights_of(model, call)  # what this pass leaves behind has no graph
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("how", ["mask", "mask_info", "carried"])
def test_masks_from_inference_mode_are_usable_in_training(make_flux, make_flux_inputs, how):
    channels = 384 if how == "carried" else 64
    model, call = routed(make_flux, channels=channels), make_flux_inputs(in_channels=channels)
    with torch.inference_mode():
        mask = box()
        if how != "carried":
            value = mask if how == "mask" else masks.analyze(mask)
            moe_lora.set_router_inputs(model, **{how: value})
        model(**call)
    model.train()
    model(**call)[0].square().mean().backward()
    router = model.moe_router.moe_lora_routers["default"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.rules.parameters())


@pytest.fixture
def readings(monkeypatch):
    """List the masks whose value range was read, each of which waits for the device."""
    read, value_range = [], validation._value_range

    def noted(values, name):
        read.extend([values] if name == "mask" else [])
        return value_range(values, name)

    monkeypatch.setattr(validation, "_value_range", noted)
    return read


@pytest.mark.parametrize(
    ("router", "kwargs"),
    [
        ("three_expert_removal", {}),
        ("three_expert_removal", {"mode": "boundary_aware"}),
        ("token_removal", {}),
    ],
)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_training_step_reads_a_masks_values_once(
    make_flux, make_flux_inputs, readings, router, kwargs, rows
):
    model = routed(make_flux, router, 64, **kwargs)
    image, target, mask = torch.rand(2, 3, 64, 96), torch.rand(2, 3, 64, 96), box()
    for _ in range(2):  # a mask that is used again is not read again
        moe_lora.set_router_inputs(model, mask=mask, image=image)
        model(**make_flux_inputs(in_channels=64))
        losses.boundary_loss(image, target, mask)
        losses.consistency_loss(image, target, mask)
        losses.detail_loss(image, target, mask)
    assert len(readings) == 1
    moe_lora.set_router_inputs(model, mask=mask[:rows])
    del readings[:]
    for _ in range(2):
        model(**make_flux_inputs(in_channels=64))
    assert readings == []


def test_a_denoising_loop_reads_a_carried_mask_once(make_flux, make_flux_inputs, readings):
    model, call = routed(make_flux, "token_removal"), make_flux_inputs()
    for _ in range(3):
        weights_of(model, call)
    assert len(readings) == 1


class TestTimestepRange:
    def make(self, make_flux):
        model = routed(make_flux, channels=64, time_aware=True)
        moe_lora.set_router_inputs(model, mask=box())
        return model

    def test_a_given_range_overrides_that_of_the_family(self, make_flux, make_flux_inputs):
        model, call = self.make(make_flux), make_flux_inputs(in_channels=64)
        call["timestep"] = torch.tensor([0.25, 0.5])
        expected = weights_of(model, call)
        moe_lora.set_router_inputs(model, mask=box(), timestep_range=(0, 1000))
        assert not torch.equal(weights_of(model, call), expected)
        torch.testing.assert_close(
            weights_of(model, {**call, "timestep": 1000 * call["timestep"]}), expected
        )

    @pytest.mark.parametrize(
        "wrong", [(0,), (0, 0), (0, float("nan")), (0, float("inf")), (0, "1"), (0, 1, 2)]
    )
    def test_other_values_raise(self, make_flux, wrong):
        with pytest.raises(ValueError, match=r"`timestep_range` to be two different finite"):
            moe_lora.set_router_inputs(self.make(make_flux), timestep_range=wrong)

    @pytest.mark.parametrize("wrong", [(0, 4), (4,), (2.0, 4.0), "ab"])
    def test_a_grid_that_is_none_raises(self, make_flux, wrong):
        with pytest.raises(ValueError, match="`grid_size` to be two integers >= 1"):
            moe_lora.set_router_inputs(self.make(make_flux), grid_size=wrong)
