from __future__ import annotations

import torch

from moe_lora.metrics.validation import check_images, check_pair, check_region


def test_the_rounding_of_a_resampled_image_is_forgiven_and_cut() -> None:
    images = torch.tensor([[[[-5e-6, 1 + 5e-6]]]])
    assert check_images(images, "prediction").tolist() == [[[[0.0, 1.0]]]]


def test_what_comes_back_is_double_and_without_graph() -> None:
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    for found in check_pair(images, images.detach(), names=("a", "b")):
        assert found.dtype == torch.float64
        assert not found.requires_grad


def test_no_region_is_everywhere() -> None:
    assert check_region(None, torch.rand(2, 3, 4, 5)).shape == (2, 1, 4, 5)
    assert check_region(None, torch.rand(2, 3, 4, 5)).all()
