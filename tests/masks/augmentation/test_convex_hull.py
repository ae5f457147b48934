from __future__ import annotations

import pytest
import torch
from skimage.morphology import convex_hull_image
from torch import Tensor

from moe_lora.masks.augmentation import convex_hull


def on_one_line(mask: Tensor) -> bool:
    points = mask[0].nonzero().double()
    return len(points) < 3 or int(torch.linalg.matrix_rank(points - points[0])) < 2


@pytest.mark.parametrize("density", [0.01, 0.05, 0.3])
def test_hulls_are_those_of_skimage(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(40, 1, 19, 26, generator=generator) < density).float()
    masks = torch.stack([mask for mask in masks if not on_one_line(mask)])
    assert len(masks) > 20
    for mask, hull in zip(masks, convex_hull(masks), strict=True):
        expected = convex_hull_image(mask[0].numpy() > 0, offset_coordinates=False)
        assert torch.equal(hull[0] > 0, torch.from_numpy(expected))


def test_points_on_a_line_are_joined() -> None:
    mask = torch.zeros(3, 1, 7, 9)
    mask[0, 0, 3, [1, 6]] = 1
    mask[1, 0, [0, 5], 2] = 1
    mask[2, 0, [0, 3, 6], [0, 3, 6]] = 1
    expected = torch.zeros_like(mask)
    expected[0, 0, 3, 1:7] = 1
    expected[1, 0, 0:6, 2] = 1
    expected[2, 0].fill_diagonal_(1)
    assert torch.equal(convex_hull(mask), expected)


def test_a_disk_is_its_own_hull_and_a_ring_is_filled() -> None:
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(200.0), indexing="ij")
    radius = ((x - 90) ** 2 + (y - 100) ** 2).sqrt()
    disk = (radius <= 80).float()[None, None]
    ring = disk * (radius > 60)
    assert torch.equal(convex_hull(disk), disk)
    assert torch.equal(convex_hull(ring), disk)


def test_a_hull_of_a_hull_is_the_hull() -> None:
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(8, 1, 40, 33, generator=generator) < 0.02).float()
    once = convex_hull(mask)
    assert torch.equal(convex_hull(once), once)
    assert bool((once >= mask).all())
