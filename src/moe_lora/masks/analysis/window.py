"""A square window around each mask, resampled to a fixed number of cells.

Numbers measured in cells of this window do not change when the object moves or is scaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Window:
    """Hold, per sample, a square of `cells` x `cells` cells and its place in the image.

    Args:
        row_weights: `(B, cells, H)`, the share of each pixel row in each cell row.
        column_weights: `(B, cells, W)`, the same for columns.
        in_image: `(B, 1, cells, cells)`, in [0, 1], the share of a cell inside the image.
        cell: `(B,)`, side of a cell in pixels, >= 1.
    """

    row_weights: Tensor
    column_weights: Tensor
    in_image: Tensor
    cell: Tensor

    def resample(self, values: Tensor) -> Tensor:
        """Average `(B, 1, H, W)` over each cell, `(B, 1, cells, cells)`; borders replicate."""
        rows_done = self.row_weights @ values[:, 0]
        return (rows_done @ self.column_weights.transpose(1, 2))[:, None]


def bounding_box(row_peak: Tensor, column_peak: Tensor, threshold: float) -> Tensor:
    """Return the box around all values of at least `threshold`.

    Args:
        row_peak: `(B, H)`, the greatest value in each row.
        column_peak: `(B, W)`, the greatest value in each column.
        threshold: the least value that counts.

    Returns:
        `(B, 4)`, int64, `(x0, y0, x1, y1)` in pixels, the end exclusive; zeros where no value
        counts.

    Example:
        >>> values = torch.zeros(1, 5, 7)
        >>> values[:, 1:3, 2:6] = 1
        >>> bounding_box(values.amax(2), values.amax(1), 0.5).tolist()
        [[2, 1, 6, 3]]
    """
    x0, x1 = _extent(column_peak >= threshold)
    y0, y1 = _extent(row_peak >= threshold)
    return torch.stack([x0, y0, x1, y1], dim=1)


def window_around(bbox: Tensor, image_size: tuple[int, int], cells: int, margin: int) -> Window:
    """Lay a square window of at most `cells` x `cells` cells around each box.

    A cell is one pixel where the box fits with `margin` cells to spare on each side, and larger
    elsewhere. One-pixel cells lie on the pixel grid, so that nothing is interpolated.

    Args:
        bbox: `(B, 4)`, `(x0, y0, x1, y1)` in pixels; around the corner for an empty one.
        image_size: `(H, W)`.
        cells: the most cells per side; fewer are laid where the image has fewer pixels.
        margin: cells between the box and the window's side.

    Returns:
        The window.
    """
    cells = min(cells, max(image_size) + 2 * margin)
    box = bbox.float()
    side = torch.maximum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])
    cell = (side / (cells - 2 * margin)).clamp(min=1)
    weights, inside = [], []
    for axis, size in ((1, image_size[0]), (0, image_size[1])):
        start = (box[:, axis] + box[:, axis + 2]) / 2 - cell * cells / 2
        start = torch.where(cell == 1, start.floor(), start)
        edges = start[:, None] + cell[:, None] * torch.arange(cells + 1, device=bbox.device)
        weights.append(_overlap(edges, size) / cell[:, None, None])
        inside.append(edges.clamp(0, size).diff(dim=1) / cell[:, None])
    return Window(
        row_weights=weights[0],
        column_weights=weights[1],
        in_image=(inside[0][:, :, None] * inside[1][:, None, :])[:, None],
        cell=cell,
    )


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    size = occupied.shape[1]
    place = torch.arange(size, device=occupied.device)
    first = torch.where(occupied, place, size).amin(1)
    end = torch.where(occupied, place + 1, 0).amax(1)
    return torch.minimum(first, end), end


def _overlap(edges: Tensor, size: int) -> Tensor:
    """Return the length of pixel j in cell i, `(B, cells, size)`; end pixels reach to infinity."""
    pixel = torch.arange(size, device=edges.device)
    covered = (edges[:, :, None] - pixel).clamp(0, 1)
    covered[:, :, 0] = edges.clamp(max=1) if size > 1 else edges
    if size > 1:
        covered[:, :, -1] = (edges - (size - 1)).clamp(min=0)
    return covered.diff(dim=1)
