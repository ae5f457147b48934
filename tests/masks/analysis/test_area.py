from __future__ import annotations

import math

import torch

from moe_lora.masks.analysis.area import area_ratio, bounding_box


def test_area_of_a_disk(disk) -> None:
    mask = disk((200, 300), cx=140, cy=90, radius=60)[None, None]
    torch.testing.assert_close(
        area_ratio(mask), torch.tensor([math.pi * 60**2 / (200 * 300)]), rtol=2e-3, atol=0.0
    )


def test_soft_values_count_by_their_share() -> None:
    mask = torch.rand(3, 1, 8, 10, generator=torch.Generator().manual_seed(0))
    slow = [sum(row.sum().item() for row in one[0]) / 80 for one in mask]
    torch.testing.assert_close(area_ratio(mask), torch.tensor(slow))


def test_box_is_that_of_the_slow_loop() -> None:
    values = torch.rand(5, 7, 9, generator=torch.Generator().manual_seed(1))
    found = bounding_box(values.amax(2), values.amax(1), 0.9)
    for one, box in zip(values, found.tolist(), strict=True):
        places = [(x, y) for y in range(7) for x in range(9) if one[y, x] >= 0.9]
        columns, rows = [x for x, _ in places], [y for _, y in places]
        assert box == [min(columns), min(rows), max(columns) + 1, max(rows) + 1]


def test_box_of_an_empty_mask_is_zero() -> None:
    nothing = torch.zeros(1, 6)
    assert bounding_box(nothing, nothing, 0.5).tolist() == [[0, 0, 0, 0]]
