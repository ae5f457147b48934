from __future__ import annotations

import math

import pytest
import torch

from moe_lora.losses import detail_loss


def reflect(index: int, size: int) -> int:
    return -index if index < 0 else 2 * (size - 1) - index if index >= size else index


def test_loss_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 1, 3, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 1, 5, 6, generator=generator, dtype=torch.float64)
    difference = (prediction - target)[0]
    total = area = 0.0
    for y in range(5):
        for x in range(6):
            weight = mask[0, 0, y, x].item()
            area += weight
            for c in range(3):
                response = 0.0
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        tap = -8 if i == j == 0 else 1
                        value = difference[c, reflect(y + i, 5), reflect(x + j, 6)].item()
                        response += tap / 16 * value
                total += weight * (math.sqrt(response**2 + 1e-6) - 1e-3) / 3
    assert detail_loss(prediction, target, mask).item() == pytest.approx(total / area)


def test_texture_outside_the_mask_does_not_count() -> None:
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., :6] = 1
    texture = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    texture[..., :7] = 0.5
    assert detail_loss(texture, torch.full_like(texture, 0.5), mask).item() == 0.0


def test_blur_costs_more_than_a_shift_in_brightness() -> None:
    mask = torch.ones(1, 1, 16, 16)
    target = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(target, 3, stride=1, padding=1)
    assert detail_loss(blurred, target, mask).item() > 0.05
    assert detail_loss(target + 0.3, target, mask).item() < 1e-6
