from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from moe_lora.masks.parts import connected_boxes, part_boxes


@pytest.mark.parametrize("size", [(128, 100), (64, 128)])
def test_parts_are_those_of_an_independent_library(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        inside = ndimage.gaussian_filter(rng.standard_normal(size), 2) > 0.12
        labels, _ = ndimage.label(inside, np.ones((3, 3)))
        expected = {(r.start, c.start, r.stop, c.stop) for r, c in ndimage.find_objects(labels)}
        assert len(expected) > 5
        assert {(*part,) for part in connected_boxes(torch.from_numpy(inside)).tolist()} == expected


def test_parts_of_a_large_mask_are_connected_over_gaps_of_less_than_a_cell() -> None:
    inside = torch.zeros(600, 1200, dtype=torch.bool)
    inside[3:20, 5:30] = inside[3:25, 33:40] = inside[300, 700] = True
    parts = {(*part,) for part in part_boxes(inside).tolist()}
    assert parts == {(3, 5, 25, 40), (300, 700, 301, 701)}


def test_boxes_that_overlap_are_joined_until_none_do() -> None:
    """The boxes of the two combs overlap, and their common box that of the speck."""
    inside = torch.zeros(60, 60, dtype=torch.bool)
    inside[0, :30] = inside[:20, 0] = True
    inside[10, 10:40] = inside[10:30, 39] = True
    inside[25, 5] = inside[50, 50] = True
    assert len(connected_boxes(inside)) == 4
    assert part_boxes(inside).tolist() == [[0, 0, 30, 40], [50, 50, 51, 51]]
