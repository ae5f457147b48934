"""Square window around each mask, resampled to a fixed number of cells.

Quantities in units of cells are invariant to translation and scale of the object.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Window:
    """Square of `cells` x `cells` cells per sample, and its position in the image.

    Args:
        row_weights: `(B, cells, H)`, share of each pixel row in each cell row.
        column_weights: `(B, cells, W)`, share of each pixel column in each cell column.
        in_image: `(B, 1, cells, cells)`, in [0, 1], share of each cell inside the image.
        cell: `(B,)`, side of a cell in pixels, >= 1.
    """

    row_weights: Tensor
    column_weights: Tensor
    in_image: Tensor
    cell: Tensor

    def resample(self, values: Tensor) -> Tensor:
        """Average `(B, 1, H, W)` over cells, `(B, 1, cells, cells)`, with replicated borders."""
        rows_done = self.row_weights @ values[:, 0]
        return (rows_done @ self.column_weights.transpose(1, 2))[:, None]


def window_around(bbox: Tensor, image_size: tuple[int, int], cells: int, margin: int) -> Window:
    """Create a square window of at most `cells` x `cells` cells around each box.

    A cell is one pixel if the box fits with a margin of `margin` cells on each side, else larger.
    One-pixel cells are aligned with the pixels, so that no values are interpolated.

    Args:
        bbox: `(B, 4)`, `(x0, y0, x1, y1)` in pixels; an empty box lies at the corner.
        image_size: `(H, W)` in pixels.
        cells: maximum number of cells per side; smaller images have fewer.
        margin: number of cells between the box and the side of the window.

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


def _overlap(edges: Tensor, size: int) -> Tensor:
    """Return the length of pixel j in cell i, `(B, cells, size)`; end pixels are infinite."""
    pixel = torch.arange(size, device=edges.device)
    covered = (edges[:, :, None] - pixel).clamp(0, 1)
    covered[:, :, 0] = edges.clamp(max=1) if size > 1 else edges
    if size > 1:
        covered[:, :, -1] = (edges - (size - 1)).clamp(min=0)
    return covered.diff(dim=1)
