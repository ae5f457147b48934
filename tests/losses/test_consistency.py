from __future__ import annotations

import math

import pytest
import torch

from moe_lora.losses import consistency_loss


def test_loss_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 1, 3, 4, 6, generator=generator, dtype=torch.float64)
    mask = torch.rand(1, 1, 4, 6, generator=generator, dtype=torch.float64)
    total = area = 0.0
    for y in range(4):
        for x in range(6):
            keep = 1 - mask[0, 0, y, x].item()
            area += keep
            for c in range(3):
                d = (prediction - target)[0, c, y, x].item()
                total += keep * (math.sqrt(d * d + 1e-6) - 1e-3) / 3
    assert consistency_loss(prediction, target, mask).item() == pytest.approx(total / area)


def test_what_is_inside_the_mask_does_not_count() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2:5, 3:7] = 1
    prediction = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction.requires_grad_()
    target = prediction.detach() + mask * 0.3
    assert consistency_loss(prediction, target, mask).item() == 0.0
    consistency_loss(prediction, target - 0.1, mask).backward()
    assert torch.equal(prediction.grad.ne(0).any(dim=1, keepdim=True).float(), 1 - mask)


def test_removing_a_shadow_outside_the_mask_is_rewarded() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4, :4] = 1
    result = torch.full((1, 3, 8, 8), 0.8)
    shadow_kept = result.clone()
    shadow_kept[..., 4:6, :4] = 0.4
    assert consistency_loss(result, result, mask) < consistency_loss(shadow_kept, result, mask)
