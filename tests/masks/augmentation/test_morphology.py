from __future__ import annotations

import pytest
import torch
from kornia.morphology import dilation, erosion
from torch import Tensor

from moe_lora.masks.augmentation import dilate, erode


def disk(radius: int) -> Tensor:
    place = torch.arange(-radius, radius + 1)
    return (place[:, None] ** 2 + place**2 <= radius**2).float()


def blots() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(3, 1, 24, 31, generator=generator) < 0.02).float()
    return dilation(mask, torch.ones(5, 5))


@pytest.mark.parametrize("radius", [1, 2, 5])
def test_sizes_change_as_by_kornia(radius: int) -> None:
    mask = blots()
    assert torch.equal(dilate(mask, radius), dilation(mask, disk(radius)))
    expected = erosion(mask, disk(radius), border_type="geodesic")
    assert torch.equal(erode(mask, radius), expected)


def test_every_sample_has_its_own_radius() -> None:
    mask = blots()
    radius = torch.tensor([0.0, 2.5, 6.0])
    for change in (dilate, erode):
        alone = torch.cat([change(mask[i : i + 1], radius[i].item()) for i in range(3)])
        assert torch.equal(change(mask, radius), alone)


def test_a_radius_of_zero_changes_nothing_but_softness() -> None:
    mask = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    for change in (dilate, erode):
        assert torch.equal(change(mask, 0.0), (mask >= 0.5).float())


def test_the_area_of_a_grown_square_is_that_of_steiner() -> None:
    mask = torch.zeros(1, 1, 200, 200)
    mask[..., 70:130, 70:130] = 1
    corner = torch.pi * 30**2 / 4 - 30  # the pixels on its straight sides belong to these
    area = 60**2 + 4 * 60 * 30 + 4 * corner
    assert dilate(mask, 30).sum().item() == pytest.approx(area, rel=0.005)


def test_the_border_of_the_image_is_no_edge() -> None:
    assert torch.equal(erode(torch.ones(1, 1, 6, 6), 4), torch.ones(1, 1, 6, 6))
    assert torch.equal(dilate(torch.zeros(1, 1, 6, 6), 4), torch.zeros(1, 1, 6, 6))


@pytest.mark.parametrize(
    ("radius", "message"),
    [
        (-1, r"Expected `radius` to be in \[0, inf\], but got values from -1 to -1"),
        (float("nan"), "Expected `radius` to be in"),
        (torch.ones(2), r"shape \(3,\), but got \(2,\)"),
    ],
)
def test_a_radius_that_is_none_raises(radius: float | Tensor, message: str) -> None:
    for change in (dilate, erode):
        with pytest.raises(ValueError, match=message):
            change(blots(), radius)
