from __future__ import annotations

import math

import pytest
import torch

from moe_lora.losses import ConsistencyLoss, consistency_loss, effect_weight


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


def test_the_weight_of_the_effect_band_is_the_smooth_step_of_the_distance() -> None:
    mask = torch.zeros(1, 1, 12, 15)
    mask[..., 3:5, 4:6] = 1
    expected = torch.zeros_like(mask)
    for y in range(12):
        for x in range(15):
            near = min(math.hypot(y - v, x - u) for v in (3, 4) for u in (4, 5))
            t = min(near / 6, 1.0)
            expected[..., y, x] = 3 * t**2 - 2 * t**3
    torch.testing.assert_close(effect_weight(mask, 6), expected)


def test_no_band_an_empty_mask_and_a_full_one() -> None:
    masks = torch.stack([torch.zeros(1, 4, 6), torch.ones(1, 4, 6)])
    assert torch.equal(effect_weight(masks, 0), torch.ones(2, 1, 4, 6))
    assert torch.equal(effect_weight(masks, 3), 1 - masks)


def test_the_relaxed_loss_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 1, 3, 4, 7, generator=generator, dtype=torch.float64)
    mask = 0.3 * torch.rand(1, 1, 4, 7, generator=generator, dtype=torch.float64)
    mask[..., 0] = 0.9
    total = area = 0.0
    for y in range(4):
        for x in range(7):
            t = min(x / 4, 1)
            region = (1 - mask[0, 0, y, x].item()) * t * t * (3 - 2 * t)
            area += region
            for c in range(3):
                d = (prediction - target)[0, c, y, x].item()
                total += region * (math.sqrt(d * d + 1e-6) - 1e-3) / 3
    found = consistency_loss(prediction, target, mask, effect_band=4)
    assert found.item() == pytest.approx(total / area)


def test_gradcheck_with_an_effect_band() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 2, 3, 5, 7, generator=generator, dtype=torch.float64)
    mask = torch.zeros(2, 1, 5, 7, dtype=torch.float64)
    mask[0, :, 1:3, 2:4] = 1
    mask[1, :, 0, 0] = 1
    assert torch.autograd.gradcheck(
        lambda image: consistency_loss(image, target, mask, effect_band=3),
        prediction.requires_grad_(),
    )


def test_against_the_source_a_shadow_in_the_band_may_go() -> None:
    """Where all there is to compare with is the source, which still has the object's shadow."""
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 4:12, 4:12] = 1
    removed = torch.full((1, 3, 32, 32), 0.8)
    source = removed.clone()
    source[..., 12:14, 4:12] = 0.4  # two pixels long
    source[..., 4:12, 4:12] = 0.1
    changed = removed.clone()
    changed[..., 28, :] = 0.4  # a mistake as large, far away
    strict, relaxed, wrong = (
        consistency_loss(image, source, mask, effect_band=band).item()
        for image, band in ((removed, 0), (removed, 12), (changed, 12))
    )
    assert relaxed < 0.1 * strict
    assert wrong > strict
    at_the_end = consistency_loss(removed, source, mask, effect_band=1).item()
    assert at_the_end == pytest.approx(strict)


def test_a_mask_and_a_band_that_cover_everything_are_zero_with_a_graph() -> None:
    prediction = torch.rand(1, 3, 6, 6).requires_grad_()
    value = consistency_loss(
        prediction, torch.zeros(1, 3, 6, 6), torch.ones(1, 1, 6, 6), effect_band=9
    )
    assert value.item() == 0.0
    value.backward()
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


@pytest.mark.parametrize("band", [-1, 2.5, True])
def test_a_band_that_is_none_raises(band: object) -> None:
    image, mask = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="Expected `effect_band` to be an integer >= 0"):
        consistency_loss(image, image, mask, effect_band=band)
    with pytest.raises(ValueError, match="Expected `effect_band` to be an integer >= 0"):
        ConsistencyLoss(effect_band=band)


def test_the_module_hands_the_band_on() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 1, 3, 9, 9, generator=generator)
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 4, 4] = 1
    expected = consistency_loss(prediction, target, mask, effect_band=5)
    assert torch.equal(ConsistencyLoss(effect_band=5)(prediction, target, mask), expected)
    assert not torch.equal(consistency_loss(prediction, target, mask), expected)
