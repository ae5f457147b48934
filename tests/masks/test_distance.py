from __future__ import annotations

import pytest
import torch
from scipy.ndimage import distance_transform_edt

from moe_lora.masks import distance_to_mask


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (17, 1), (23, 31)])
@pytest.mark.parametrize("limit", [1, 3, 40])
def test_distances_are_those_of_scipy(size: tuple[int, int], limit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(3, 1, *size, generator=generator) < 0.1).float()
    mask[:, :, size[0] // 2, size[1] // 3] = 1
    found = distance_to_mask(mask, limit)
    for sample, distance in zip(mask[:, 0], found[:, 0], strict=True):
        expected = torch.from_numpy(distance_transform_edt(1 - sample.numpy())).float()
        torch.testing.assert_close(distance, expected.clamp(max=limit))


def test_an_empty_mask_is_at_the_limit_and_a_full_one_at_zero() -> None:
    mask = torch.stack([torch.zeros(1, 6, 9), torch.ones(1, 6, 9)])
    assert distance_to_mask(mask, 4).flatten(1).unique(dim=1).flatten().tolist() == [4.0, 0.0]


def test_a_soft_mask_counts_from_one_half_on() -> None:
    mask = torch.tensor([[[[0.49, 0.0, 0.5]]]], requires_grad=True)
    found = distance_to_mask(mask, 9)
    assert found.tolist() == [[[[2.0, 1.0, 0.0]]]]
    assert not found.requires_grad


def test_half_precision_gives_float32() -> None:
    mask = torch.zeros(1, 1, 4, 300, dtype=torch.bfloat16)
    mask[..., 0] = 1
    found = distance_to_mask(mask, 299)
    assert found.dtype == torch.float32
    assert found[0, 0, 0].tolist() == list(range(300))


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_a_limit_that_is_none_raises(limit: object) -> None:
    with pytest.raises(ValueError, match="Expected `limit` to be an integer >= 1"):
        distance_to_mask(torch.zeros(1, 1, 4, 4), limit)
