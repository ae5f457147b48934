from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moe_lora.masks.augmentation import strokes


def points(*places: tuple[int, int], size: tuple[int, int] = (60, 90)) -> Tensor:
    mask = torch.zeros(1, 1, *size)
    for row, column in places:
        mask[0, 0, row, column] = 1
    return mask


def test_a_stroke_is_a_capsule() -> None:
    mask = points((20, 15), (40, 70))
    found = strokes(mask, torch.tensor([[0.0, 0.5]]), 8)
    length = math.hypot(20, 55)
    assert found.sum().item() == pytest.approx(2 * 8 * length + math.pi * 64, rel=0.01)


def slow(mask: Tensor, order: list[tuple[int, int]], radius: float) -> Tensor:
    result = mask.clone()
    for row in range(mask.shape[2]):
        for column in range(mask.shape[3]):
            for (y0, x0), (y1, x1) in pairwise(order):
                for share in [i / 400 for i in range(401)]:
                    y, x = y0 + share * (y1 - y0), x0 + share * (x1 - x0)
                    if (row - y) ** 2 + (column - x) ** 2 <= radius**2:
                        result[0, 0, row, column] = 1
                        break
    return result


def test_a_stroke_goes_through_its_pixels_in_order() -> None:
    mask = points((1, 1), (3, 9), (9, 4), size=(12, 12))
    picks = torch.tensor([[0.9, 0.0, 0.4]])  # the third pixel, the first, the second
    expected = slow(mask, [(9, 4), (1, 1), (3, 9)], 1.3)
    assert torch.equal(strokes(mask, picks, 1.3), expected)


def test_one_pick_makes_a_dot_and_the_mask_stays() -> None:
    mask = points((10, 10), (50, 80))
    found = strokes(mask, torch.tensor([[0.75]]), 3.0)
    assert found[0, 0, 10, 10] == 1
    assert found.sum().item() == 1 + 29  # the pixels of a disk of radius 3


def test_samples_have_their_own_pixels_and_radius() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(3, 1, 20, 30, generator=generator) < 0.03).float()
    picks, radius = torch.rand(3, 4, generator=generator), torch.tensor([0.0, 1.0, 4.0])
    alone = [strokes(mask[i : i + 1], picks[i : i + 1], radius[i].item()) for i in range(3)]
    assert torch.equal(strokes(mask, picks, radius), torch.cat(alone))


def test_an_empty_mask_stays_empty() -> None:
    empty = torch.zeros(1, 1, 9, 9)
    assert torch.equal(strokes(empty, torch.tensor([[0.0, 0.99]]), 3), empty)


@pytest.mark.parametrize("picks", [torch.zeros(2, 3), torch.zeros(1), torch.zeros(1, 0)])
def test_picks_of_another_shape_raise(picks: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Expected `picks` to have shape \(1, P\)"):
        strokes(points((1, 1)), picks, 1)


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_picks_out_of_range_raise(value: float) -> None:
    with pytest.raises(ValueError, match=r"values in \[0, 1\)"):
        strokes(points((1, 1)), torch.tensor([[value]]), 1)
