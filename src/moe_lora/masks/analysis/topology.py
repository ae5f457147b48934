"""Topology of a mask: holes and connected parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.analysis.window import Window

CELLS = 64
MARGIN = 1
_LEAST_COVER = 0.05
_LEAST_SHARE = 0.02


def has_occlusion(inside: Tensor, window: Window) -> Tensor:
    """Detect masks with holes or several parts.

    The mask is resampled to a window of at most 64 x 64 cells; a cell is masked if at least 5 % of
    it is. Masked cells are 8-connected, other cells 4-connected. A mask has occlusion if

    - all parts except the largest have at least 2 % of the mask's area, or
    - at least 2 % as many cells as are masked are enclosed by the mask.

    Cells between the mask and the image's border are not enclosed. Gaps and holes narrower than a
    cell, about 1/60 of the mask's longer side, are ignored.

    Args:
        inside: `(B, 1, H, W)`, 0.0 or 1.0.
        window: window around the mask.

    Returns:
        `(B,)`, bool.
    """
    cover = window.resample(inside) * (window.in_image > 0.5)
    cover = F.pad(cover[:, 0], (1, 1, 1, 1))
    occupied = cover >= _LEAST_COVER
    labels = connected_labels(occupied)
    flat = occupied.flatten(1)
    area = cover.flatten(1) * flat
    parts = torch.zeros_like(area).scatter_add_(1, labels, area)
    total = area.sum(1)
    several = total - parts.amax(1) >= _LEAST_SHARE * total
    enclosed = (~flat & (labels != 0)).sum(1)
    holed = enclosed >= _LEAST_SHARE * flat.sum(1)
    return (several | holed) & flat.any(1)


def connected_labels(occupied: Tensor) -> Tensor:
    """Label the connected parts of a mask and of its complement.

    Each cell repeatedly takes the smallest label among its neighbors' roots and its own root, with
    pointer jumping. The number of rounds is fixed at twice the bit length of the number of cells.
    This bound is empirical: 66 x 66 cells take 26 rounds, while random masks, spirals, serpentines
    and mazes converge within 13.

    Args:
        occupied: `(B, h, w)`, bool.

    Returns:
        `(B, h * w)`, int64, the smallest flat index in each cell's part. Occupied cells are
        8-connected, other cells 4-connected.

    Source: Zhang, Azad, Hu, "FastSV: a distributed-memory connected component algorithm with fast
        convergence", 2020.

    Example:
        >>> connected_labels(torch.tensor([[[True, False, True]]])).tolist()
        [[0, 1, 2]]
    """
    batch, height, width = occupied.shape
    count = height * width
    parent = torch.arange(count, device=occupied.device).expand(batch, count).contiguous()
    grandparent = parent
    for _ in range(2 * count.bit_length()):
        seen = _least_neighbor(grandparent.view(batch, height, width), occupied).flatten(1)
        hooked = parent.scatter_reduce(1, parent, seen, "amin")
        parent = torch.minimum(torch.minimum(hooked, seen), grandparent)
        grandparent = parent.gather(1, parent)
    return grandparent


def _least_neighbor(labels: Tensor, occupied: Tensor) -> Tensor:
    none = labels.shape[1] * labels.shape[2]
    part = F.pad(torch.where(occupied, labels, none), (1, 1, 1, 1), value=none)
    part = _least_of_three(_least_of_three(part, 1), 2)
    rest = F.pad(torch.where(occupied, none, labels), (1, 1, 1, 1), value=none)
    columns = _least_of_three(rest[:, :, 1:-1], 1)
    rows = _least_of_three(rest[:, 1:-1], 2)
    return torch.where(occupied, part, torch.minimum(rows, columns))


def _least_of_three(labels: Tensor, dim: int) -> Tensor:
    size = labels.shape[dim] - 2
    first, second, third = (labels.narrow(dim, start, size) for start in range(3))
    return torch.minimum(torch.minimum(first, second), third)
