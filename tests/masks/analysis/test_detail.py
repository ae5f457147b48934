from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.ndimage import convolve
from skimage import data
from torch import Tensor

from moe_lora.masks import analyze

Draw = Callable[..., Tensor]


def detail(mask: Tensor, image: Tensor) -> Tensor:
    value = analyze(mask, image).detail_complexity
    assert value is not None
    return value


def square(size: int, start: int, stop: int) -> Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., start:stop, start:stop] = 1
    return mask


def test_flat_surroundings_have_no_detail() -> None:
    assert detail(square(64, 20, 40), torch.full((1, 3, 64, 64), 0.7)).item() < 1e-4


def test_checkerboard_has_its_closed_form() -> None:
    """Each pixel differs by 1 from its 4 side neighbors: |Laplacian| = 4 / 16."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    image = ((x + y) % 2).float().expand(1, 3, 64, 64)
    assert detail(square(64, 24, 40), image).item() == pytest.approx(0.25 / 0.258, abs=1e-3)


def test_agrees_with_a_slow_reading_of_the_rule() -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kernel = torch.ones(3, 3)
    kernel[1, 1] = -8
    luma = 0.299 * image[0, 0] + 0.587 * image[0, 1] + 0.114 * image[0, 2]
    energy = abs(convolve(luma.double().numpy(), kernel.numpy() / 16, mode="nearest"))
    near = torch.zeros(64, 64, dtype=torch.bool)
    near[16:48, 16:48] = True
    near[19:45, 19:45] = False
    mean = energy[near.numpy()].mean()
    got = detail(square(64, 20, 44), image).item()
    assert got == pytest.approx(mean / (mean + 0.008), abs=1e-4)


def test_content_under_the_mask_and_far_away_does_not_count() -> None:
    mask = square(64, 28, 36)
    image = torch.rand(1, 3, 64, 64)
    other = image.clone()
    other[..., 28:36, 28:36] = torch.rand(8, 8)
    other[..., :8, :] = torch.rand(8, 64)
    assert torch.equal(detail(mask, other), detail(mask, image))
    other[..., 25, 30] = 1 - other[..., 25, 30].round()
    assert not torch.equal(detail(mask, other), detail(mask, image))


def test_photograph_has_more_detail_in_the_hair_than_on_the_wall() -> None:
    photograph = torch.from_numpy(data.chelsea()[:300, :300].copy()).permute(2, 0, 1)[None] / 255
    fur, blurred = torch.zeros(2, 1, 1, 300, 300)
    fur[..., 100:150, 150:200] = 1
    blurred[..., 5:45, 5:45] = 1
    masks = torch.cat([fur, blurred])
    values = detail(masks, photograph.expand(2, -1, -1, -1))
    assert values[0] > 1.5 * values[1]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_without_mask_or_surroundings_there_is_none(value: float) -> None:
    mask = torch.full((1, 1, 40, 24), value)
    assert detail(mask, torch.rand(1, 3, 40, 24)).item() == 0


def test_gradient_reaches_the_surroundings_only() -> None:
    image = torch.rand(1, 3, 64, 64, requires_grad=True)
    detail(square(64, 20, 44), image).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad[..., 20:44, 20:44].abs().sum() == 0
    assert image.grad[..., 16:20, 16:48].abs().sum() > 0
