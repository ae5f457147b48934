"""Masks whose area, contour and parts are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor

Draw = Callable[..., Tensor]


def _grid(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return y + 0.5, x + 0.5


@pytest.fixture
def disk() -> Draw:
    """Draw `(H, W)` masks of a disk around `(cx, cy)`."""

    def draw(size: tuple[int, int], cx: float, cy: float, radius: float) -> Tensor:
        y, x = _grid(size)
        return ((x - cx) ** 2 + (y - cy) ** 2 <= radius**2).float()

    return draw


@pytest.fixture
def ellipse() -> Draw:
    """Draw `(H, W)` masks of an upright ellipse in the middle."""

    def draw(size: tuple[int, int], a: float, b: float) -> Tensor:
        y, x = _grid(size)
        return (((x - size[1] / 2) / a) ** 2 + ((y - size[0] / 2) / b) ** 2 <= 1).float()

    return draw


@pytest.fixture
def comb() -> Draw:
    """Draw a comb in units of `unit` pixels: a back 1 high, `teeth` teeth 1 wide and 5 long."""

    def draw(size: int, unit: int, teeth: int = 5, start: int = 8) -> Tensor:
        mask = torch.zeros(size, size)
        mask[start : start + unit, start : start + (2 * teeth - 1) * unit] = 1
        for tooth in range(teeth):
            left = start + 2 * tooth * unit
            mask[start : start + 6 * unit, left : left + unit] = 1
        return mask

    return draw


@pytest.fixture
def blobs() -> Draw:
    """Draw `(B, 1, H, W)` random blobs that cover about half of the image."""

    def draw(batch: int, size: int, sigma: float, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(batch, 1, size, size, generator=generator)
        side = 2 * int(3 * sigma) + 1
        smooth = gaussian_blur2d(noise, (side, side), (sigma, sigma))
        return (smooth > smooth.flatten(1).median(1).values[:, None, None, None]).float()

    return draw
