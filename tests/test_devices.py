"""What the CPU computes in fp32 comes out alike in bf16, and on CUDA in both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_models import tiny_vae
from torch import Tensor

import moe_lora
from moe_lora import MoELoraConfig, RemovalLoss, flow, masks, metrics
from moe_lora.losses import ExpertSignals, LatentDecoder

ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PLACES = [
    pytest.param("cpu", torch.bfloat16, id="cpu-bf16"),
    pytest.param("cuda", torch.float32, id="cuda-fp32", marks=ON_CUDA),
    pytest.param("cuda", torch.bfloat16, id="cuda-bf16", marks=ON_CUDA),
]
SHARE_OFF = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Of the norm; CUDA's convolutions of fp32 may round as TF32 does."""

ROWS, COLUMNS = 4, 6
SIGMA = torch.tensor([0.25, 0.5])  # the same in bf16

Found = dict[str, Tensor]


def picture_and_mask() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2, 1, 16 * ROWS, 16 * COLUMNS)
    mask[0, :, 10:40, 12:50] = mask[1, :, 30:44, 60:90] = 1
    return torch.rand(2, 3, 16 * ROWS, 16 * COLUMNS, generator=generator).bfloat16().float(), mask


def analyzed(device: str, dtype: torch.dtype) -> Found:
    image, mask = (value.to(device, dtype) for value in picture_and_mask())
    info = masks.analyze(mask, image)
    return {
        "features": info.features(),
        "band": masks.boundary_band(mask, 2),
        "tokens": masks.to_tokens(mask, (ROWS, COLUMNS)),
        "pasted": masks.composite(image.flip(0), image, mask, feather=2),
        "kept": masks.keep_source(image.flip(0), image, mask, lambda one: one.roll(1, -1)),
        "corrected": masks.correct_seam(image, image.flip(0), mask),
    }


def measured(device: str, dtype: torch.dtype) -> Found:
    image, mask = (value.to(device, dtype) for value in picture_and_mask())
    found = metrics.measure(image.flip(0), image, mask, image.flip(-1))
    return {name: value.values for name, value in found.items()}


def losses(device: str, dtype: torch.dtype, **options: int) -> Found:
    """Return components and the gradient; the decoder runs in fp32, as it is advised to."""
    image, mask = (value.to(device, dtype) for value in picture_and_mask())
    torch.manual_seed(1)
    x0, noise, guess = torch.randn(3, 2, 16, 2 * ROWS, 2 * COLUMNS).bfloat16().float()
    sigma = SIGMA.to(device)
    x_t = flow.interpolate(x0, noise, SIGMA).to(device, dtype)
    velocity = guess.to(device, dtype).requires_grad_()
    loss = RemovalLoss(decoder=LatentDecoder(tiny_vae().to(device)), **options)
    total, components = loss(
        velocity,
        (noise - x0).to(device, dtype),
        x_t=x_t,
        sigma=sigma,
        mask=mask,
        target=image,
    )
    total.backward()
    return {**components, "gradient": velocity.grad}


def in_windows(device: str, dtype: torch.dtype) -> Found:
    return losses(device, dtype, window_margin=1)


def routed_step(router: str, make_flux, make_inputs, targets, signals: bool = False):
    def step(device: str, dtype: torch.dtype) -> Found:
        model = make_flux()
        model.add_adapter(MoELoraConfig(r=2, target_modules=targets, router=router))
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.05)
        model.eval().to(device, dtype)
        inputs = {
            name: value.to(device, torch.float32 if name.endswith("ids") else dtype)
            for name, value in make_inputs(rows=ROWS, columns=COLUMNS).items()
        } | {"timestep": SIGMA.to(device, dtype)}
        if signals:
            expert_grad_mask = ExpertSignals(RemovalLoss()).expert_grad_mask(
                torch.tensor([0, 2], device=device)
            )
            with moe_lora.routing.teach_experts(model, expert_grad_mask):
                output = model(**inputs, return_dict=False)[0]
        else:
            output = model(**inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        decision = moe_lora.current_routing(model)
        gradients = [p.grad.flatten() for n, p in model.named_parameters() if "lora_B" in n]
        of_router = [p.grad.flatten() for n, p in model.named_parameters() if "router" in n]
        return {
            "output": output,
            "weights": decision.weights,
            "experts": torch.cat(gradients),
            "router": torch.cat(of_router),
        }

    return step


def agree(compute: Callable[[str, torch.dtype], Found], device: str, dtype: torch.dtype) -> None:
    expected, found = compute("cpu", torch.float32), compute(device, dtype)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].device.type == device
        difference = found[name].detach().double().cpu() - wanted.detach().double()
        assert difference.norm() <= SHARE_OFF[dtype] * wanted.double().norm(), name


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("compute", [analyzed, measured, losses, in_windows])
def test_masks_metrics_and_losses(compute, device, dtype):
    agree(compute, device, dtype)


@pytest.mark.parametrize(("device", "dtype"), PLACES)
@pytest.mark.parametrize("router", ["three_expert_removal", "token_removal"])
@pytest.mark.parametrize("signals", [False, True])
def test_a_routed_step(make_flux, make_flux_inputs, flux_targets, router, signals, device, dtype):
    agree(routed_step(router, make_flux, make_flux_inputs, flux_targets, signals), device, dtype)
