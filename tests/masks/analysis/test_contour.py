from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from skimage.measure import perimeter_crofton
from torch import Tensor

from moe_lora.masks import analyze

Draw = Callable[..., Tensor]
SIZE = (256, 256)


def complexity(*masks: Tensor) -> list[float]:
    values: list[float] = analyze(torch.stack(masks)[:, None]).edge_complexity.tolist()
    return values


def smoothness(*masks: Tensor) -> list[float]:
    values: list[float] = analyze(torch.stack(masks)[:, None]).boundary_smoothness.tolist()
    return values


@pytest.mark.parametrize("radius", [1.5, 3, 6, 12, 30, 60, 120])
def test_disks_of_all_sizes_are_simple_and_smooth(disk: Draw, radius: float) -> None:
    mask = disk(SIZE, 128.3, 127.6, radius)
    assert complexity(mask)[0] < 0.015
    assert smoothness(mask)[0] > 0.93


@pytest.mark.parametrize("side", [60, 120, 220])
def test_square_has_its_isoperimetric_ratio(side: int) -> None:
    mask = torch.zeros(SIZE)
    mask[10 : 10 + side, 20 : 20 + side] = 1
    assert complexity(mask)[0] == pytest.approx(1 - math.sqrt(math.pi) / 2, abs=0.02)


def test_ring_and_two_disks_have_their_ratios(disk: Draw) -> None:
    ring = disk(SIZE, 128, 128, 100) - disk(SIZE, 128, 128, 50)
    two = disk(SIZE, 60, 128, 50) + disk(SIZE, 190, 128, 50)
    expected = [1 - math.sqrt(100**2 - 50**2) / 150, 1 - math.sqrt(0.5)]
    assert complexity(ring, two) == pytest.approx(expected, abs=0.02)


def test_comb_has_its_ratio_and_is_high(comb: Draw) -> None:
    unit, teeth = 20, 5
    area = (2 * teeth - 1) + 5 * teeth
    length = 2 * (2 * teeth - 1) + 2 + 10 * teeth
    expected = 1 - math.sqrt(4 * math.pi * area) / length
    assert expected > 0.65
    assert complexity(comb(256, unit, teeth))[0] == pytest.approx(expected, abs=0.03)


def test_ratio_agrees_with_skimage_on_random_blobs(blobs: Draw, disk: Draw) -> None:
    masks = blobs(8, 256, 14.0) * disk(SIZE, 128, 128, 100)
    expected = []
    for mask in masks[:, 0].numpy() > 0.5:
        length = perimeter_crofton(mask, directions=4)
        expected.append(1 - math.sqrt(4 * math.pi * mask.sum()) / length)
    got = analyze(masks).edge_complexity.tolist()
    assert got == pytest.approx(expected, abs=0.04)
    assert max(expected) - min(expected) > 0.04


def test_order_from_disk_to_ragged(disk: Draw, ellipse: Draw, comb: Draw, blobs: Draw) -> None:
    ragged = blobs(1, 256, 3.0)[0, 0] * disk(SIZE, 128, 128, 100)
    shapes = [disk(SIZE, 128, 128, 80), ellipse(SIZE, 110, 40), comb(256, 20), ragged]
    values = complexity(*shapes)
    assert values == sorted(values)
    assert values[-1] > 0.75


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_half_planes_are_straight(share: float) -> None:
    upright = torch.zeros(96, 200)
    upright[:, : int(200 * share)] = 1
    flat = torch.zeros(96, 200)
    flat[int(96 * share) :] = 1
    y, x = torch.meshgrid(torch.arange(96), torch.arange(200), indexing="ij")
    slanted = (x + y > 300 * share).float()
    assert complexity(upright, flat, slanted) == pytest.approx([0, 0, 0], abs=0.01)
    assert smoothness(upright, flat, slanted) == pytest.approx([1, 1, 1], abs=0.02)


def test_disks_cut_by_the_border_stay_simple(disk: Draw) -> None:
    cuts = [disk(SIZE, 60 * cut, 128, 60) for cut in (1.0, 0.9, 0.5, 0.0, -0.4)]
    corner = disk(SIZE, 0, 256, 90)
    assert max(complexity(*cuts, corner)) < 0.08
    assert min(smoothness(*cuts, corner)) > 0.95


def test_half_and_quarter_stars_count_as_the_whole_star() -> None:
    """A quarter's contour runs from tip to tip; its chord is longer than its roundness asks."""
    y, x = torch.meshgrid(torch.arange(400) - 199.5, torch.arange(400) - 199.5, indexing="ij")
    edge = 130 * (1 + 0.35 * torch.cos(12 * torch.atan2(y, x)))
    star = (torch.hypot(x, y) <= edge).float()
    whole = complexity(star)[0]
    assert whole > 0.6
    assert complexity(star[:, 200:])[0] == pytest.approx(whole, abs=0.02)
    assert complexity(star[:200])[0] == pytest.approx(whole, abs=0.02)
    length = math.sqrt(4 * math.pi * star.sum().item()) / (1 - whole) / 4
    expected = 1 - 1.35 * 130 * math.sqrt(2) / length
    quarters = star[:200, :200], star[200:, :200]
    assert complexity(*quarters) == pytest.approx([expected] * 2, abs=0.02)


def test_ragged_coast_on_the_border_is_complex() -> None:
    coast = torch.zeros(128, 128)
    coast[:, :20] = 1
    for tooth in range(0, 128, 16):
        coast[tooth : tooth + 8, :60] = 1
    assert complexity(coast)[0] > 0.5


def test_smoothness_is_not_the_opposite_of_complexity(ellipse: Draw, comb: Draw) -> None:
    long, toothed = ellipse(SIZE, 120, 12), comb(256, 20)
    assert complexity(long)[0] > 0.45
    assert smoothness(long)[0] > 0.97
    assert smoothness(toothed)[0] < 0.92


def test_smoothness_falls_with_raggedness(disk: Draw, blobs: Draw) -> None:
    inside = disk(SIZE, 128, 128, 100)
    values = smoothness(inside, *(blobs(1, 256, s)[0, 0] * inside for s in (12.0, 6.0, 2.0)))
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.98
    assert values[-1] < 0.5


@pytest.mark.parametrize("radius", [12, 16, 24])
def test_smoothness_of_equal_disks_has_its_closed_form(disk: Draw, radius: int) -> None:
    """Each of `n` disks has coherence exp(-2 (2.5 / r)^2); one of their area has less to turn.

    The disks are drawn four times as large and averaged: no staircase of pixels.
    """
    centers = [(4 * x, 4 * y) for x in (36, 92) for y in (36, 92)]
    four = torch.stack([disk((512, 512), x, y, 4 * radius) for x, y in centers]).sum(0)
    turn = 2 * (2.5 / radius) ** 2
    expected = 1 + math.exp(-turn) - math.exp(-turn / 4)
    got = smoothness(torch.nn.functional.avg_pool2d(four[None], 4)[0])[0]
    assert got == pytest.approx(expected, abs=0.012)


@pytest.mark.parametrize("unit", [12, 24, 48])
def test_scale_does_not_matter(comb: Draw, unit: int) -> None:
    """Above one pixel per cell the numbers are the same, whatever the scale."""
    small = analyze(comb(640, 14)[None, None])
    large = analyze(comb(640, unit)[None, None])
    torch.testing.assert_close(large.edge_complexity, small.edge_complexity, atol=0.01, rtol=0)
    torch.testing.assert_close(
        large.boundary_smoothness, small.boundary_smoothness, atol=0.02, rtol=0
    )


@pytest.mark.parametrize("unit", [4, 16])
def test_shift_and_quarter_turns_do_not_matter(comb: Draw, unit: int) -> None:
    mask = comb(256, unit, start=30)[None, None]
    mask[..., 30:40, 33:35] = 0.5
    still = analyze(mask)
    for moved in (
        mask.roll((7, 13), (2, 3)),
        mask.rot90(1, (2, 3)),
        mask.rot90(2, (2, 3)),
        mask.flip(3),
    ):
        info = analyze(moved)
        for name in ("area_ratio", "edge_complexity", "boundary_smoothness", "has_occlusion"):
            torch.testing.assert_close(getattr(info, name), getattr(still, name), atol=2e-4, rtol=0)
