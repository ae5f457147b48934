"""Bounding boxes of the parts of a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.analysis.topology import connected_labels

_CELLS = 128
"""Cells along the longer side of an image; parts of a mask in adjacent cells are one part."""


def part_boxes(inside: Tensor) -> Tensor:
    """Return disjoint boxes that contain all pixels of a mask, one for each of its parts.

    Args:
        inside: `(H, W)`, bool, with at least one pixel.

    Returns:
        `(K, 4)`, top, left, bottom and right in pixels, end exclusive.

    Example:
        >>> inside = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]]).bool()
        >>> part_boxes(inside).tolist()
        [[0, 0, 1, 2], [1, 3, 2, 4]]
    """
    return _disjoint(connected_boxes(inside))


def connected_boxes(inside: Tensor) -> Tensor:
    """Return the bounding box of every connected part of a mask; they may overlap.

    Args:
        inside: as above; with more than 128 pixels a side, parts in adjacent cells are connected.

    Returns:
        `(K, 4)`, top, left, bottom and right in pixels, end exclusive.
    """
    cell = -(-max(inside.shape) // _CELLS)
    padded = F.pad(inside, (0, -inside.shape[1] % cell, 0, -inside.shape[0] % cell))
    rows, columns = padded.shape[0] // cell, padded.shape[1] // cell
    cells = padded.view(rows, cell, columns, cell)
    by_row, by_column = cells.any(3).transpose(1, 2), cells.any(1)
    occupied = by_row.any(2)
    first, last = [], []
    for start, filled in zip(occupied.nonzero().mT, (by_row, by_column), strict=True):
        seen = filled[occupied].int()
        first.append(start * cell + seen.argmax(1))
        last.append((start + 1) * cell - seen.flip(1).argmax(1))
    labels = connected_labels(occupied[None])[0].view(rows, columns)[occupied]
    return _union(torch.stack([*first, *last], 1), labels)


def _union(boxes: Tensor, labels: Tensor) -> Tensor:
    """Return the box around all boxes `(K, 4)` of each label `(K,)`."""
    names, index = labels.unique(return_inverse=True)
    where = index[:, None].expand(-1, 2)
    start, end = boxes[:, :2], boxes[:, 2:]
    found = boxes.new_zeros(len(names), 2)
    return torch.cat(
        [
            found.scatter_reduce(0, where, start, "amin", include_self=False),
            found.scatter_reduce(0, where, end, "amax", include_self=False),
        ],
        dim=1,
    )


def _disjoint(boxes: Tensor) -> Tensor:
    """Join boxes `(K, 4)` that overlap, until none do."""
    while True:
        before = (boxes[:, None, :2] < boxes[None, :, 2:]).all(2)
        owner = (before & before.mT).int().argmax(1)
        if (owner == torch.arange(len(boxes), device=boxes.device)).all():
            return boxes
        boxes = _union(boxes, owner)
