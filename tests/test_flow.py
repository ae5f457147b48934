from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from moe_lora import flow

SIZES = [(2, 2), (4, 6), (16, 8), (8, 32), (2, 10)]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 6, 8), (3, 4, 2, 6), (3, 2, 2, 4, 2)])
def test_interpolate_is_the_formula_sample_by_sample(shape: tuple[int, ...]) -> None:
    x0, noise = random(*shape), random(*shape, seed=1)
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x_t = flow.interpolate(x0, noise, sigma)
    for b, s in enumerate(sigma.tolist()):
        torch.testing.assert_close(x_t[b], (1 - s) * x0[b] + s * noise[b])
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[2], noise[2])


@pytest.mark.parametrize("shape", [(3, 5), (3, 6, 8), (3, 4, 2, 6)])
def test_velocity_leads_back_to_x0_and_x0_to_velocity(shape: tuple[int, ...]) -> None:
    x0, noise = random(*shape), random(*shape, seed=1)
    sigma = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x_t = flow.interpolate(x0, noise, sigma)
    velocity = flow.velocity(x0, noise)
    torch.testing.assert_close(flow.velocity_to_x0(x_t, velocity, sigma), x0)
    torch.testing.assert_close(flow.x0_to_velocity(x_t, x0, sigma), velocity)


def test_velocity_is_the_slope_of_the_path() -> None:
    x0, noise = random(2, 4), random(2, 4, seed=1)
    step = (flow.interpolate(x0, noise, torch.tensor(0.75).double()) - x0) / 0.75
    torch.testing.assert_close(step, flow.velocity(x0, noise))


def test_a_scalar_sigma_serves_the_whole_batch() -> None:
    x_t, velocity = random(2, 3, 4), random(2, 3, 4, seed=1)
    scalar = flow.velocity_to_x0(x_t, velocity, torch.tensor(0.25))
    assert torch.equal(scalar, flow.velocity_to_x0(x_t, velocity, torch.full((2,), 0.25)))


def test_a_wide_sigma_widens_the_arithmetic_but_not_the_result() -> None:
    x0, noise = random(2, 64).bfloat16(), random(2, 64, seed=1).bfloat16()
    sigma = torch.tensor([0.123456, 0.87654])
    x_t = flow.interpolate(x0, noise, sigma)
    assert x_t.dtype == torch.bfloat16
    wide = flow.interpolate(x0.float(), noise.float(), sigma)
    assert torch.equal(x_t, wide.bfloat16())
    assert flow.velocity_to_x0(x0, noise, sigma).dtype == torch.bfloat16
    assert flow.x0_to_velocity(x0, noise, sigma).dtype == torch.bfloat16


def test_gradient_with_respect_to_the_velocity_is_minus_sigma() -> None:
    velocity = random(2, 3, 4).requires_grad_()
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    flow.velocity_to_x0(random(2, 3, 4, seed=1), velocity, sigma).sum().backward()
    torch.testing.assert_close(velocity.grad, -sigma.view(2, 1, 1).expand(2, 3, 4))


@pytest.mark.parametrize("sigma", [torch.tensor([0.5, 0.0]), torch.tensor([0.5, float("nan")])])
def test_a_sigma_of_zero_determines_no_velocity(sigma: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="Expected `sigma` to be > 0"):
        flow.x0_to_velocity(random(2, 3), random(2, 3), sigma)


@pytest.mark.parametrize("sigma", [torch.ones(3), torch.ones(1), torch.ones(2, 1, 1, 1)])
def test_sigma_has_one_value_per_sample(sigma: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected `sigma` to have shape \(B,\) = \(2,\)"):
        flow.interpolate(random(2, 4, 2, 2), random(2, 4, 2, 2), sigma)


def test_shapes_that_would_broadcast_are_refused() -> None:
    narrow, wide = random(2, 1, 2, 2), random(2, 4, 2, 2)
    sigma = torch.tensor([0.5, 0.5])
    for call in (
        lambda: flow.interpolate(wide, narrow, sigma),
        lambda: flow.velocity(wide, narrow),
        lambda: flow.velocity_to_x0(wide, narrow, sigma),
        lambda: flow.x0_to_velocity(wide, narrow, sigma),
    ):
        with pytest.raises(ValueError, match=r"to have shape \(2, 4, 2, 2\), but got \(2, 1, 2"):
            call()


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (torch.tensor([1, 0]), "floating point"),
        (torch.tensor([0.5, 873.0]), "from 0.5 to 873"),
        (torch.tensor([-0.1]), r"in \[0, 1\]"),
        (torch.tensor([float("nan")]), r"in \[0, 1\]"),
    ],
)
def test_check_sigma_refuses_what_is_no_noise_level(sigma: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flow.check_sigma(sigma)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_packing_equals_the_flux_pipeline_bit_for_bit(height: int, width: int) -> None:
    latents = random(2, 16, height, width, dtype=torch.float32)
    packed = flow.pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, height, width))
    unpacked = FluxPipeline._unpack_latents(packed, 8 * height, 8 * width, vae_scale_factor=8)
    assert torch.equal(flow.unpack_latents(packed, height, width), unpacked)
    assert torch.equal(unpacked, latents)


def test_packing_takes_strided_latents() -> None:
    latents = random(2, 4, 6, 4).transpose(2, 3)
    packed = flow.pack_latents(latents)
    assert torch.equal(packed, flow.pack_latents(latents.contiguous()))
    assert torch.equal(flow.unpack_latents(packed, 4, 6), latents)


def test_packing_carries_gradient() -> None:
    latents = random(1, 4, 4, 2).requires_grad_()
    weight = random(1, 2, 16, seed=1)
    (flow.pack_latents(latents) * weight).sum().backward()
    assert torch.equal(latents.grad, flow.unpack_latents(weight, 4, 2))


@pytest.mark.parametrize("shape", [(1, 4, 3, 2), (1, 4, 2, 3), (4, 2, 2)])
def test_odd_latents_cannot_be_packed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="h and w even"):
        flow.pack_latents(torch.zeros(shape))


@pytest.mark.parametrize(
    ("shape", "size", "message"),
    [
        ((1, 8, 16), (4, 4), "4 tokens for latents of 4x4, but got 8"),
        ((1, 8, 16), (32, 64), "not of the image"),
        ((1, 8, 16), (3, 8), "even and positive, but got 3 and 8"),
        ((1, 8, 16), (0, 8), "even and positive"),
        ((1, 8, 15), (4, 8), r"\(B, tokens, 4C\)"),
        ((1, 4, 4, 8), (4, 8), r"\(B, tokens, 4C\)"),
    ],
)
def test_sizes_that_do_not_fit_the_tokens_are_refused(
    shape: tuple[int, ...], size: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flow.unpack_latents(torch.zeros(shape), *size)
