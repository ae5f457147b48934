from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_lora.masks.augmentation import bezier_box, box, ellipse


def scattered() -> Tensor:
    mask = torch.zeros(2, 1, 64, 96)
    mask[0, 0, 12, 40] = mask[0, 0, 51, 20] = mask[0, 0, 30, 79] = 1
    mask[1, 0, 5, 5] = 1
    return mask


def test_a_box_holds_what_lies_between_the_outermost_pixels() -> None:
    expected = torch.zeros(2, 1, 64, 96)
    expected[0, :, 12:52, 20:80] = 1
    expected[1, :, 5, 5] = 1
    assert torch.equal(box(scattered()), expected)
    wide = torch.zeros_like(expected)
    wide[0, :, 9:55, 17:83] = 1
    wide[1, :, 0:11, 0:11] = 1
    assert torch.equal(box(scattered(), torch.tensor([3.0, 5.0])), wide)


def test_the_area_of_an_ellipse() -> None:
    mask = scattered()[:1]
    for scale in (0.5, 1.0):
        area = math.pi / 4 * 40 * 60 * scale**2
        assert ellipse(mask, scale).sum().item() == pytest.approx(area, rel=0.02)
    assert bool((ellipse(mask) >= box(mask)).all())
    assert not bool((ellipse(mask, 1.3) >= box(mask)).all())


def slow_bezier_box(edges: tuple[int, ...], bulge: Tensor, size: tuple[int, int]) -> Tensor:
    """The polygon of the four curves, sampled finely, filled by the rule of crossings."""
    x0, y0, x1, y1 = edges
    top, bottom, left, right = bulge.tolist()
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    sides = [
        (top, (0, -1)),
        (right, (1, 0)),
        (bottom[::-1], (0, 1)),
        (left[::-1], (-1, 0)),
    ]
    points = []
    for index, (control, normal) in enumerate(sides):
        start, end = corners[index], corners[(index + 1) % 4]
        for t in torch.linspace(0, 1, 200)[:-1].tolist():
            out = 3 * (1 - t) ** 2 * t * control[0] + 3 * (1 - t) * t**2 * control[1]
            points.append(
                [
                    start[axis] + t * (end[axis] - start[axis]) + out * normal[axis]
                    for axis in (0, 1)
                ]
            )
    first = torch.tensor(points, dtype=torch.float64)
    second = first.roll(-1, 0)
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in size)
    spans = (first[:, 1] > y[:, None]) != (second[:, 1] > y[:, None])
    slope = (second[:, 0] - first[:, 0]) / (second[:, 1] - first[:, 1])
    crossing = first[:, 0] + (y[:, None] - first[:, 1]) * slope
    right_of = (spans & (crossing > x[:, None, None])).sum(-1)
    return (right_of % 2).float().T


@pytest.mark.parametrize("seed", range(4))
def test_a_bezier_box_is_the_polygon_of_its_curves(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = scattered()[:1]
    bulge = 16 * torch.rand(1, 4, 2, generator=generator) - 4
    expected = slow_bezier_box((20, 12, 80, 52), bulge[0], (64, 96))
    found = bezier_box(mask, bulge)[0, 0]
    assert (found != expected).sum().item() <= 2  # a pixel's middle on a curve
    assert not torch.equal(found, box(mask)[0, 0])


def test_straight_curves_make_the_box_and_an_empty_mask_stays_empty() -> None:
    assert torch.equal(bezier_box(scattered(), torch.zeros(2, 4, 2)), box(scattered()))
    empty = torch.zeros(1, 1, 8, 8)
    for drawn in (box(empty, 3), ellipse(empty), bezier_box(empty, torch.full((1, 4, 2), 9.0))):
        assert torch.equal(drawn, empty)


def test_parameters_that_are_none_raise() -> None:
    with pytest.raises(ValueError, match=r"Expected `bulge` to have shape \(2, 4, 2\)"):
        bezier_box(scattered(), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Expected `scale`"):
        ellipse(scattered(), 0.0)
    with pytest.raises(ValueError, match="Expected `margin`"):
        box(scattered(), -1.0)
