from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Images(NamedTuple):
    prediction: Tensor
    target: Tensor
    source: Tensor
    mask: Tensor


@pytest.fixture
def images() -> Images:
    """Return a batch of three: a mask in the middle, one at the border, and an empty one."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(3, 3, 40, 56, generator=generator)
    prediction = (target + 0.2 * torch.randn(target.shape, generator=generator)).clamp(0, 1)
    mask = torch.zeros(3, 1, 40, 56)
    mask[0, :, 10:25, 12:40] = 1
    mask[1, :, :9, 50:] = 1
    source = torch.where(mask > 0, 0.3, target)
    source[0, :, 25:30, 12:40] *= 0.4
    return Images(prediction, target, source, mask)
