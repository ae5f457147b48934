from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from moe_lora.masks import composite


def pictures(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    result = torch.rand(3, 3, 24, 36, generator=generator).to(dtype)
    source = torch.rand(3, 3, 24, 36, generator=generator).to(dtype)
    mask = torch.zeros(3, 1, 24, 36)
    mask[0, :, 8:14, 10:20] = 1
    mask[1] = (torch.rand(1, 24, 36, generator=generator) > 0.99).float()
    return result, source, mask


def distance_to(mask: Tensor) -> np.ndarray:
    """Return the Euclidean distances that scipy finds, infinite for an empty mask."""
    found = [
        ndimage.distance_transform_edt(one[0].numpy() < 0.5)
        if (one >= 0.5).any()
        else np.full(one.shape[1:], np.inf)
        for one in mask
    ]
    return np.stack(found)[:, None]


@pytest.mark.parametrize("feather", [0, 1, 2, 5, 60])
def test_the_weight_follows_the_distance(feather: int) -> None:
    _, _, mask = pictures()
    weight = composite(torch.ones(3, 2, 24, 36), torch.zeros(3, 2, 24, 36), mask, feather)
    nearness = (1 - distance_to(mask) / (feather + 1)).clip(0, 1)
    expected = nearness**2 * (3 - 2 * nearness)
    for channel in range(2):
        np.testing.assert_allclose(weight[:, channel : channel + 1], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feather", [0, 3])
def test_it_is_exact_on_both_sides_of_the_edge(feather: int, dtype: torch.dtype) -> None:
    result, source, mask = pictures(dtype)
    out = composite(result, source, mask, feather)
    assert out.dtype == dtype
    distance = torch.from_numpy(distance_to(mask)).expand_as(out)
    assert torch.equal(out[distance == 0], result[distance == 0])
    away = distance >= feather + 1
    assert away.any()
    assert torch.equal(out[away], source[away])
    between = (distance > 0) & ~away
    assert bool(between.any()) == (feather > 0)
    low, high = torch.minimum(result, source), torch.maximum(result, source)
    assert ((out >= low) & (out <= high))[between].all()


def test_an_empty_mask_gives_the_source_and_a_full_one_the_result() -> None:
    result, source, mask = pictures()
    assert torch.equal(composite(result, source, torch.zeros_like(mask), 8), source)
    assert torch.equal(composite(result, source, torch.ones_like(mask), 8), result)


def test_what_a_broken_result_holds_outside_does_not_matter() -> None:
    result, source, mask = pictures()
    result = torch.where(torch.from_numpy(distance_to(mask)) >= 3, math.nan, result)
    assert torch.isfinite(composite(result, source, mask, 2)).all()


def test_soft_masks_are_blended_as_they_are() -> None:
    result, source, _ = pictures()
    soft = torch.full((3, 1, 24, 36), 0.25)
    expected = source + 0.25 * (result - source)
    torch.testing.assert_close(composite(result, source, soft, 4), expected)
    torch.testing.assert_close(composite(result, source, soft + 0.5, 0), result * 0.75 + source / 4)


def test_gradients_reach_everything() -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (1, 2, 4, 6)
    inputs = [torch.rand(shape, generator=generator).double().requires_grad_() for _ in range(2)]
    mask = torch.rand(1, 1, 4, 6, generator=generator)
    assert torch.autograd.gradcheck(lambda a, b: composite(a, b, mask, 2), inputs)
    mask.requires_grad_()
    composite(*inputs, mask).sum().backward()
    expected = (inputs[0] - inputs[1]).sum(1, keepdim=True).float()
    torch.testing.assert_close(mask.grad, expected)


def test_a_batch_is_its_samples() -> None:
    result, source, mask = pictures()
    together = composite(result, source, mask, 3)
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.equal(together[one], composite(result[one], source[one], mask[one], 3))


def test_transposing_transposes() -> None:
    result, source, mask = pictures()
    turned = composite(result.mT, source.mT, mask.mT, 4)
    torch.testing.assert_close(turned.mT, composite(result, source, mask, 4))


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"feather": -1}, ValueError, "`feather` to be an integer >= 0, but got -1"),
        ({"feather": 1.5}, ValueError, "`feather`"),
        ({"feather": True}, ValueError, "`feather`"),
        ({"result": torch.zeros(2, 3, 24, 36)}, ValueError, "`result` to have shape"),
        ({"result": torch.zeros(3, 24, 36)}, ValueError, "`result` to have shape"),
        ({"source": torch.zeros(3, 1, 24, 36)}, ValueError, "`source` to have the shape"),
        ({"source": torch.zeros(3, 3, 24, 36).double()}, TypeError, "dtype of `result`"),
        ({"result": torch.zeros(3, 3, 24, 36).byte()}, TypeError, "`result` .*uint8"),
        ({"source": None}, TypeError, "`source` .*NoneType"),
        ({"mask": torch.full((3, 1, 24, 36), 255.0)}, ValueError, "divide by 255"),
        ({"mask": torch.zeros(3, 1, 24, 36).bool()}, TypeError, "`mask`"),
    ],
)
def test_bad_input_is_told(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    result, source, mask = pictures()
    given = {"result": result, "source": source, "mask": mask, "feather": 0} | changed
    with pytest.raises(error, match=match):
        composite(**given)
