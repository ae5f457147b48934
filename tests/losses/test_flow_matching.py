from __future__ import annotations

import math

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from moe_lora.losses import BaseLoss, base_loss, sigma_weight

SCHEMES = ["none", "sigma_sqrt", "cosmap"]


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype),
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype),
    )


@pytest.mark.parametrize("weighting", SCHEMES)
def test_weights_are_those_of_sd3_training(weighting: str) -> None:
    sigma = torch.tensor([0.05, 0.5, 0.7, 1.0])
    expected = compute_loss_weighting_for_sd3(weighting, sigma)
    torch.testing.assert_close(sigma_weight(sigma, weighting), expected)


def test_cosmap_is_a_density() -> None:
    sigma = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    assert sigma_weight(sigma, "cosmap").mean().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 4, 6), (3, 6, 8)])
@pytest.mark.parametrize("weighting", SCHEMES)
def test_loss_is_the_loop(shape: tuple[int, ...], weighting: str) -> None:
    velocity, target = pair(*shape)
    sigma = [0.2, 0.5, 0.9]
    weight = {
        "none": lambda s: 1.0,
        "sigma_sqrt": lambda s: 1 / s**2,
        "cosmap": lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s * s)),
    }[weighting]
    expected = []
    for b in range(3):
        squares = [
            (v - t) ** 2 for v, t in zip(velocity[b].flatten(), target[b].flatten(), strict=True)
        ]
        expected.append(weight(sigma[b]) * float(sum(squares)) / len(squares))
    arguments = {"sigma": torch.tensor(sigma, dtype=torch.float64), "weighting": weighting}
    per_sample = base_loss(velocity, target, **arguments, reduction="none")
    assert per_sample.tolist() == pytest.approx(expected)
    assert base_loss(velocity, target, **arguments).item() == pytest.approx(sum(expected) / 3)
    module = BaseLoss(weighting=weighting, reduction="none")
    assert torch.equal(module(velocity, target, arguments["sigma"]), per_sample)


def test_unweighted_loss_is_torch_mse_whatever_sigma() -> None:
    velocity, target = pair(2, 4, 6)
    expected = torch.nn.functional.mse_loss(velocity, target)
    torch.testing.assert_close(base_loss(velocity, target), expected)
    torch.testing.assert_close(base_loss(velocity, target, sigma=torch.zeros(2)), expected)


def test_zero_at_the_optimum() -> None:
    velocity, _ = pair(2, 4, 6)
    velocity.requires_grad_()
    loss = base_loss(velocity, velocity.detach(), sigma=torch.ones(2), weighting="cosmap")
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(velocity.grad, torch.zeros_like(velocity))


@pytest.mark.parametrize("weighting", SCHEMES)
def test_gradcheck(weighting: str) -> None:
    velocity, target = pair(2, 2, 2, 4)
    sigma = torch.tensor([0.3, 0.8], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda v: base_loss(v, target, sigma=sigma, weighting=weighting), velocity.requires_grad_()
    )


def test_half_precision_is_summed_in_float32() -> None:
    velocity, target = pair(2, 4, 64, 64, dtype=torch.bfloat16)
    loss = base_loss(velocity, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, base_loss(velocity.float(), target.float()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weighting": "sigma-sqrt"}, "Expected `weighting` to be one of"),
        ({"weighting": "cosmap"}, "Expected `sigma` to be a tensor"),
        ({"weighting": "cosmap", "sigma": torch.ones(3)}, r"shape \(B,\) = \(2,\)"),
        ({"weighting": "cosmap", "sigma": torch.ones(2, 1)}, r"shape \(B,\) = \(2,\)"),
        ({"weighting": "cosmap", "sigma": torch.tensor([3.0, 999.0])}, "division by 1000"),
        ({"weighting": "sigma_sqrt", "sigma": torch.tensor([0.0, 1.0])}, "got a sigma of 0"),
        ({"reduction": "sum"}, "Expected `reduction` to be one of"),
    ],
)
def test_options_that_cannot_be_honored_raise(arguments: dict[str, object], message: str) -> None:
    velocity, target = pair(2, 4)
    with pytest.raises(ValueError, match=message):
        base_loss(velocity, target, **arguments)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected `target_velocity` to have the shape"):
        base_loss(torch.zeros(2, 4, 2, 2), torch.zeros(2, 1, 2, 2))
