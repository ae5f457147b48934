"""Result of the mask analysis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moe_lora.masks.validation import is_checked, mark_checked


@dataclass(frozen=True, eq=False)
class MaskInfo:
    """Properties of a batch of masks, the output of `analyze`.

    Args:
        mask: `(B, 1, H, W)`, float32 in [0, 1], pixel space; 1 = remove.
        mask_latent: `(B, 1, h, w)`, float32 in [0, 1], the mean of the mask over each latent pixel.
        area_ratio: `(B,)`, float32 in [0, 1], masked share of the image.
        edge_complexity: `(B,)`, float32 in [0, 1], the excess length of the contour,
            `1 - sqrt(4 pi area) / length` for a mask that does not touch the image's border; 0 for
            a disk, close to 1 for ragged contours.
        boundary_smoothness: `(B,)`, float32 in [0, 1], the directional coherence of the contour at
            a scale of 2 % of the mask's longer side, corrected by that of a disk of the same area;
            1 for smooth contours.
        has_occlusion: `(B,)`, bool; whether the mask has holes or several parts.
        bbox: `(B, 4)`, int64, `(x0, y0, x1, y1)` in pixels, end exclusive; zeros if empty.
        detail_complexity: `(B,)`, float32 in [0, 1], `e / (e + 0.008)` of the mean `e` of the
            absolute Laplacian of the luma around the mask; None without an image.

    Example:
        >>> from moe_lora.masks import analyze
        >>> mask = torch.zeros(2, 1, 64, 64)
        >>> mask[1, :, 8:24, 16:48] = 1
        >>> info = analyze(mask)
        >>> info.bbox.tolist()
        [[0, 0, 0, 0], [16, 8, 48, 24]]
        >>> info.features().shape
        torch.Size([2, 5])
    """

    mask: Tensor
    mask_latent: Tensor
    area_ratio: Tensor
    edge_complexity: Tensor
    boundary_smoothness: Tensor
    has_occlusion: Tensor
    bbox: Tensor
    detail_complexity: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskInfo:
        """Move every tensor to a device.

        Args:
            device: target device.
            non_blocking: see `torch.Tensor.to`.

        Returns:
            A new `MaskInfo`; tensors that are already on `device` are shared.

        Example:
            >>> from moe_lora.masks import analyze
            >>> analyze(torch.ones(1, 1, 16, 16)).to("meta").area_ratio.device.type
            'meta'
        """
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def select(self, index: Tensor) -> MaskInfo:
        """Select samples by index, with repetition.

        Args:
            index: `(N,)`, integers in [0, B).

        Returns:
            A new `MaskInfo` of N samples.

        Example:
            >>> from moe_lora.masks import analyze
            >>> info = analyze(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, -1, 8, 8))
            >>> info.select(torch.tensor([1, 0, 1])).area_ratio.tolist()
            [1.0, 0.0, 1.0]
        """
        return self._map(lambda value: value[index.to(value.device)])

    def copy(self) -> MaskInfo:
        """Clone every tensor, with gradient to the originals."""
        return self._map(torch.clone)

    def features(self) -> Tensor:
        """Stack the properties that routers use as features.

        Returns:
            `(B, 5)`, float32 in [0, 1]: area_ratio, edge_complexity, boundary_smoothness,
            has_occlusion as 0.0/1.0, and detail_complexity, 0.0 without an image.

        Example:
            >>> from moe_lora.masks import analyze
            >>> analyze(torch.ones(1, 1, 16, 16)).features().tolist()
            [[1.0, 0.0, 1.0, 0.0, 0.0]]
        """
        detail = self.detail_complexity
        numbers = (
            self.area_ratio,
            self.edge_complexity,
            self.boundary_smoothness,
            self.has_occlusion,
            torch.zeros_like(self.area_ratio) if detail is None else detail,
        )
        return torch.stack([number.float() for number in numbers], dim=1)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MaskInfo:
        """Apply a function that preserves values to every tensor."""
        changed: dict[str, Any] = {}
        for field in fields(self):
            value: Tensor | None = getattr(self, field.name)
            changed[field.name] = None if value is None else function(value)
        info = MaskInfo(**changed)
        if is_checked(self.mask):
            mark_checked(info.mask)
        return info
