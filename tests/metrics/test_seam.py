from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_lora.metrics import seam_error


def slow_seam_error(result: Any, truth: Any, mask: Any) -> tuple[float, int]:
    difference = (result.double() - truth.double()).numpy()
    inside = mask[0].numpy() >= 0.5
    height, width = inside.shape
    total, pairs = 0.0, 0
    for row in range(height):
        for column in range(width):
            for other in ((row + 1, column), (row, column + 1)):
                if other[0] < height and other[1] < width and inside[row, column] != inside[other]:
                    step = difference[:, row, column] - difference[:, other[0], other[1]]
                    total += abs(step).mean()
                    pairs += 1
    return total / max(pairs, 1), pairs


def test_it_is_the_mean_over_the_pairs_that_straddle_the_edge(pictures: Any) -> None:
    found = seam_error(pictures.result, pictures.truth, pictures.mask)
    for index in range(3):
        value, pairs = slow_seam_error(
            pictures.result[index], pictures.truth[index], pictures.mask[index]
        )
        assert found.values[index].item() == pytest.approx(value, rel=1e-9)
        assert int(found.pixels[index]) == pairs
    assert found.pixels.tolist() == [2 * (15 + 28), 9 + 6, 0]


def test_a_step_at_the_edge_is_its_own_height(pictures: Any) -> None:
    truth = 0.5 * pictures.truth
    for step in (0.0, 0.125, 0.5):
        found = seam_error(truth + step * pictures.mask, truth, pictures.mask)
        assert found.tolist()[:2] == pytest.approx([step, step], abs=1e-6)


def test_being_wrong_everywhere_alike_is_no_seam(pictures: Any) -> None:
    truth = 0.5 * pictures.truth
    assert seam_error(truth + 0.25, truth, pictures.mask).mean() == pytest.approx(0, abs=1e-7)


def test_errors_away_from_the_edge_are_no_seam(pictures: Any) -> None:
    result = pictures.truth.clone()
    result[0, :, 15:20, 20:30] = 0
    result[0, :, 30:, :] = 0
    assert seam_error(result, pictures.truth, pictures.mask).tolist() == [0.0, 0.0, None]


def test_without_an_edge_it_is_missing() -> None:
    pictures = torch.rand(2, 3, 8, 8)
    mask = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    found = seam_error(pictures, pictures.flip(0), mask)
    assert found.tolist() == [None, None]
    assert found.values.tolist() == [0.0, 0.0]


def test_bad_input_is_told(pictures: Any) -> None:
    with pytest.raises(ValueError, match="`mask` to fit images"):
        seam_error(pictures.result, pictures.truth, pictures.mask[..., 1:])
    with pytest.raises(ValueError, match="`mask`"):
        seam_error(pictures.result, pictures.truth, 255 * pictures.mask)
    with pytest.raises(ValueError, match="`truth`"):
        seam_error(pictures.result, 255 * pictures.truth, pictures.mask)
