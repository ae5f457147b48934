from __future__ import annotations

import math

import pytest
import torch
from scipy import ndimage

from moe_lora.losses import boundary_loss, default_band_width


def test_loss_is_the_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 1, 3, 7, 9, generator=generator, dtype=torch.float64)
    mask = torch.zeros(1, 1, 7, 9, dtype=torch.float64)
    mask[..., 2:5, 3:7] = 1
    inside = mask[0, 0].numpy() > 0.5
    square = [[1, 1, 1], [1, 1, 1], [1, 1, 1]]
    band = ndimage.binary_dilation(inside, square) & ~ndimage.binary_erosion(
        inside, square, border_value=1
    )
    difference = (prediction - target)[0].numpy()
    total, count = 0.0, 0
    for y in range(7):
        for x in range(9):
            if not band[y, x]:
                continue
            for c in range(3):
                slopes = [0.0, 0.0]
                for i in (-1, 0, 1):
                    for j in (-1, 0, 1):
                        value = difference[c, min(max(y + i, 0), 6), min(max(x + j, 0), 8)]
                        slopes[0] += j * (2 - abs(i)) / 8 * value
                        slopes[1] += i * (2 - abs(j)) / 8 * value
                for slope in slopes:
                    total += math.sqrt(slope**2 + 1e-6) - 1e-3
                    count += 1
    assert count > 0
    assert boundary_loss(prediction, target, mask, width=1).item() == pytest.approx(total / count)


def test_a_step_at_the_edge_costs_and_a_step_elsewhere_does_not() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    seam, elsewhere = torch.zeros(2, 1, 3, 32, 32)
    seam[..., 16:] = 0.5
    elsewhere[..., 25:] = 0.5
    flat = torch.zeros(1, 3, 32, 32)
    assert boundary_loss(seam, flat, mask, width=2).item() > 0.05
    assert boundary_loss(elsewhere, flat, mask, width=2).item() == 0.0


def test_a_shift_in_brightness_is_no_seam() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 4:9, 4:9] = 1
    image = torch.full((1, 3, 16, 16), 0.25)
    assert boundary_loss(image + 0.5, image, mask).item() == 0.0


def test_width_sets_how_far_the_band_reaches() -> None:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    step = torch.zeros(1, 3, 32, 32)
    step[..., 21:] = 0.5
    values = [boundary_loss(step, 0 * step, mask, width=width).item() for width in (2, 6)]
    assert values[0] == 0.0
    assert values[1] > 0.0


@pytest.mark.parametrize(
    ("size", "width"), [((512, 512), 8), ((1024, 512), 8), ((1024, 1024), 16), ((64, 64), 2)]
)
def test_the_default_width_keeps_its_share_of_the_image(size: tuple[int, int], width: int) -> None:
    assert default_band_width(*size) == width


def test_the_default_width_is_used() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.rand(2, 1, 3, 192, 200, generator=generator)
    mask = torch.zeros(1, 1, 192, 200)
    mask[..., 50:90, 60:70] = 1
    values = [boundary_loss(prediction, target, mask, width=w) for w in (None, 3, 4)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
