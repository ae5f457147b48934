"""Detail complexity of the surroundings of a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from kornia.filters import laplacian
from torch import Tensor

_GRID = 32
_REACH = 2
_TYPICAL = 0.008
_LUMA = (0.299, 0.587, 0.114)
_TINY = 1e-6


def detail_complexity(mask: Tensor, image: Tensor) -> Tensor:
    """Compute the fine detail of the image around a mask.

    `d = e / (e + 0.008)`, where e is the mean of `|Laplacian(luma)|` over the surroundings.

    The 3 x 3 Laplacian is normalized to a sum of absolute weights of 1. The surroundings are the
    pixels whose Laplacian reads no masked pixel, in blocks of 1/32 of the image's longer side at
    most two blocks away from a masked block. The object under the mask has no influence. 0.008 is
    the mean of e over photographs of 128 to 512 pixels, so that typical surroundings give about
    0.5. Masks that are empty or have no surroundings give 0.

    Args:
        mask: `(B, 1, H, W)`, float32, in [0, 1]; 1 = remove.
        image: `(B, 3, H, W)`, float32, in [0, 1].

    Returns:
        `(B,)`, float32 in [0, 1).
    """
    luma = torch.einsum("bchw,c->bhw", image, image.new_tensor(_LUMA))[:, None]
    energy = laplacian(luma, 3, border_type="replicate").abs()
    weight = (1 - _dilate_3x3(mask)).clamp(0, 1)
    height, width = mask.shape[2:]
    block = max(1, max(height, width) // _GRID)
    blocks = (-(-height // block), -(-width // block))
    masked = F.adaptive_avg_pool2d((mask.detach() >= 0.5).float(), blocks) > 0
    side = 2 * _REACH + 1
    near = F.max_pool2d(masked.float(), side, stride=1, padding=_REACH)
    total = (near * F.adaptive_avg_pool2d(energy * weight, blocks)).sum((1, 2, 3))
    share = (near * F.adaptive_avg_pool2d(weight, blocks)).sum((1, 2, 3))
    mean = total / (share + _TINY)
    return mean / (mean + _TYPICAL)


def _dilate_3x3(mask: Tensor) -> Tensor:
    """Return the maximum of each 3 x 3 neighborhood; faster than max pooling on CPUs."""
    padded = F.pad(mask, (1, 1, 1, 1))
    for dim in (2, 3):
        size = mask.shape[dim]
        first, second, third = (padded.narrow(dim, start, size) for start in range(3))
        padded = torch.maximum(torch.maximum(first, second), third)
    return padded
