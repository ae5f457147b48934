from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_lora.metrics import seam_error


def slow_seam_error(prediction: Any, target: Any, mask: Any) -> tuple[float, int]:
    difference = (prediction.double() - target.double()).numpy()
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


def test_it_is_the_mean_over_the_pairs_that_straddle_the_edge(images: Any) -> None:
    found = seam_error(images.prediction, images.target, images.mask)
    for index in range(3):
        value, pairs = slow_seam_error(
            images.prediction[index], images.target[index], images.mask[index]
        )
        assert found.values[index].item() == pytest.approx(value, rel=1e-9)
        assert int(found.pixels[index]) == pairs
    assert found.pixels.tolist() == [2 * (15 + 28), 9 + 6, 0]


def test_a_step_at_the_edge_is_its_own_height(images: Any) -> None:
    target = 0.5 * images.target
    for step in (0.0, 0.125, 0.5):
        found = seam_error(target + step * images.mask, target, images.mask)
        assert found.tolist()[:2] == pytest.approx([step, step], abs=1e-6)


def test_being_wrong_everywhere_alike_is_no_seam(images: Any) -> None:
    target = 0.5 * images.target
    assert seam_error(target + 0.25, target, images.mask).mean() == pytest.approx(0, abs=1e-7)


def test_errors_away_from_the_edge_are_no_seam(images: Any) -> None:
    prediction = images.target.clone()
    prediction[0, :, 15:20, 20:30] = 0
    prediction[0, :, 30:, :] = 0
    assert seam_error(prediction, images.target, images.mask).tolist() == [0.0, 0.0, None]


def test_without_an_edge_it_is_missing() -> None:
    images = torch.rand(2, 3, 8, 8)
    mask = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    found = seam_error(images, images.flip(0), mask)
    assert found.tolist() == [None, None]
    assert found.values.tolist() == [0.0, 0.0]


def test_bad_input_is_told(images: Any) -> None:
    with pytest.raises(ValueError, match="`mask` to have the batch and image size of `prediction`"):
        seam_error(images.prediction, images.target, images.mask[..., 1:])
    with pytest.raises(ValueError, match="`mask`"):
        seam_error(images.prediction, images.target, 255 * images.mask)
    with pytest.raises(ValueError, match="`target`"):
        seam_error(images.prediction, 255 * images.target, images.mask)
