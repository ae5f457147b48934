"""A training step through experts, router, losses and decoder together."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_vae

import moe_lora
from moe_lora import MoELoraConfig, RemovalLoss
from moe_lora.flow import interpolate, pack_latents
from moe_lora.losses import LatentDecoder

OFF = {"base": 0.0, "boundary": 0.0, "consistency": 0.0, "detail": 0.0}


@pytest.fixture(scope="module")
def vae():
    return tiny_vae(mid_block_add_attention=False)


@pytest.mark.parametrize("name", ["base", "boundary", "consistency", "detail"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_loss_alone_trains_every_expert_and_the_router(
    vae, make_flux, make_flux_inputs, flux_targets, name, checkpointing
):
    rows, columns = 4, 6
    model = make_flux()
    model.add_adapter(
        MoELoraConfig(r=2, target_modules=flux_targets, router="three_expert_removal")
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.02)
    if checkpointing:
        model.enable_gradient_checkpointing()
    loss = RemovalLoss(**{**OFF, name: 1.0}, decoder=LatentDecoder(vae), max_sigma=1.0)
    mask = torch.zeros(2, 1, 16 * rows, 16 * columns)
    mask[0, :, 10:40, 12:50] = 1
    mask[1, :, 30:44, 60:90] = 1
    sigma = torch.tensor([0.2, 0.5])
    x0, noise = torch.randn(2, 2, 16, 2 * rows, 2 * columns)
    x_t = pack_latents(interpolate(x0, noise, sigma))
    inputs = make_flux_inputs(rows=rows, columns=columns)
    inputs["hidden_states"][..., :64] = x_t
    inputs["timestep"] = sigma
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainable.items()}
    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    total, components = loss(
        model(**inputs)[0],
        pack_latents(noise - x0),
        x_t=x_t,
        sigma=sigma,
        mask=mask,
        target=torch.rand(2, 3, 16 * rows, 16 * columns),
        height=2 * rows,
        width=2 * columns,
    )
    assert set(components) == {name}
    total.backward()
    optimizer.step()
    for parameter_name, parameter in trainable.items():
        assert parameter.grad.abs().sum() > 0, parameter_name
        change = (parameter - before[parameter_name]).detach().abs()
        if "lora_A" in parameter_name:
            assert (change.sum((1, 2)) > 0).all(), parameter_name
        elif "lora_B" in parameter_name:
            assert (change.sum((0, 2)) > 0).all(), parameter_name


def test_the_modes_switch_during_training(make_flux, make_flux_inputs, flux_targets):
    model = make_flux()
    model.add_adapter(
        MoELoraConfig(
            r=2,
            target_modules=flux_targets,
            router="three_expert_removal",
            init_lora_weights=False,
        )
    )
    inputs = make_flux_inputs()
    routers = list(model.moe_router.parameters())
    for mode in ("uniform", "routed", "uniform"):
        moe_lora.set_routing_mode(model, mode)
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        learned = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in routers]
        assert all(learned) if mode == "routed" else not any(learned)


def test_expert_signals_let_each_loss_train_its_own_expert(
    vae, make_flux, make_flux_inputs, flux_targets
):
    rows, columns = 4, 6
    model = make_flux()
    model.add_adapter(
        MoELoraConfig(
            r=2,
            target_modules=flux_targets,
            router="three_expert_removal",
            init_lora_weights=False,
        )
    )
    names = model.peft_config["default"].expert_names
    loss = RemovalLoss(decoder=LatentDecoder(vae), max_sigma=1.0)
    signals = moe_lora.losses.ExpertSignals(loss, expert_names=names)
    mask = torch.zeros(2, 1, 16 * rows, 16 * columns)
    mask[:, :, 10:40, 12:50] = 1
    sigma = torch.tensor([0.2, 0.5])
    x0, noise = torch.randn(2, 2, 16, 2 * rows, 2 * columns)
    x_t = pack_latents(interpolate(x0, noise, sigma))
    inputs = make_flux_inputs(rows=rows, columns=columns)
    for place, component in enumerate(signals.components):
        assignment = torch.full((2,), place)
        model.zero_grad()
        with moe_lora.routing.teach_experts(model, signals.expert_grad_mask(assignment)):
            velocity = model(**inputs)[0]
        total, components = signals(
            velocity,
            pack_latents(noise - x0),
            assignment=assignment,
            x_t=x_t,
            sigma=sigma,
            mask=mask,
            target=torch.rand(2, 3, 16 * rows, 16 * columns),
            height=2 * rows,
            width=2 * columns,
        )
        assert set(components) == {component}
        total.backward()
        wanted = [
            component == "base" or name == moe_lora.losses.EXPERT_OF_LOSS.get(component)
            for name in names
        ]
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                assert (parameter.grad.abs().sum((1, 2)) > 0).tolist() == wanted, name
            elif "lora_B" in name:
                assert (parameter.grad.abs().sum((0, 2)) > 0).tolist() == wanted, name
