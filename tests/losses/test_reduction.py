from __future__ import annotations

import math

import pytest
import torch

from moe_lora.losses import reduction


def test_charbonnier_is_the_closed_form() -> None:
    for d in (-2.0, -1e-3, 0.0, 1e-5, 0.3):
        value = reduction.charbonnier(torch.tensor(d, dtype=torch.float64)).item()
        assert value == pytest.approx(math.sqrt(d * d + 1e-6) - 1e-3, rel=1e-9, abs=1e-15)


def test_charbonnier_loses_no_digits_to_cancellation_in_float32() -> None:
    d = torch.tensor(1e-5)
    assert reduction.charbonnier(d).item() == pytest.approx(4.99987500625e-8, rel=1e-5)


def test_charbonnier_is_exactly_zero_with_zero_slope_at_zero() -> None:
    for dtype in (torch.float32, torch.float64):
        d = torch.zeros(3, dtype=dtype, requires_grad=True)
        value = reduction.charbonnier(d)
        value.sum().backward()
        assert torch.equal(value, torch.zeros_like(value))
        assert torch.equal(d.grad, torch.zeros_like(d))


def test_region_mean_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    error = torch.rand(3, 2, 4, 5, generator=generator, dtype=torch.float64)
    region = torch.rand(3, 1, 4, 5, generator=generator, dtype=torch.float64)
    for b in range(3):
        total = area = 0.0
        for y in range(4):
            for x in range(5):
                weight = region[b, 0, y, x].item()
                area += weight
                total += weight * sum(error[b, c, y, x].item() for c in range(2)) / 2
        assert reduction.region_mean(error, region)[b].item() == pytest.approx(total / area)


def test_rounding_is_no_region() -> None:
    rounding = torch.full((1, 1, 64, 64), 6e-8)
    assert reduction.region_mean(torch.ones(1, 3, 64, 64), rounding).item() < 1e-3


def test_half_precision_is_widened_and_double_is_kept() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert reduction.at_least_float32(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    assert reduction.at_least_float32(torch.zeros(1).double()).dtype == torch.float64
