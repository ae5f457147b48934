"""Contour of a mask: edge complexity and boundary smoothness."""

from __future__ import annotations

import math

import torch
from kornia.filters import gaussian_blur2d, spatial_gradient
from torch import Tensor

from moe_lora.masks.analysis.window import Window

CELLS = 128
MARGIN = 8
_ANTIALIAS = 0.7
_COHERENCE_SCALE = 2.5
_TINY = 1e-4


def contour_gradient(mask: Tensor, window: Window) -> Tensor:
    """Compute the Sobel gradient of the slightly blurred mask, per cell of the window.

    Args:
        mask: `(B, 1, H, W)`, float32, in [0, 1].
        window: window around the mask.

    Returns:
        `(B, 2, cells, cells)`, derivatives in x and y per cell; zero outside the image, whose
        border is not part of the contour.
    """
    cells = gaussian_blur2d(window.resample(mask), (3, 3), (_ANTIALIAS, _ANTIALIAS), "replicate")
    gradient: Tensor = spatial_gradient(cells, mode="sobel")[:, 0]
    return gradient * window.in_image


def edge_complexity(mask: Tensor, gradient: Tensor, window: Window, bbox: Tensor) -> Tensor:
    """Compute the edge complexity, the excess length of the contour.

    `c = 1 - max(sqrt(4 pi A / k) / P, |integral of grad m| / P)`, clamped to [0, 1], with the area
    A and the contour length `P = integral of |grad m|`.

    The first term is the isoperimetric ratio, 1 for a disk. The factor k = k_x * k_y mirrors masks
    that are cut by the image's border: `k_x = 1 + |left - right|`, with the shares of the mask's
    height on the left and right border, and k_y correspondingly. A half disk at the border and a
    quarter disk in a corner therefore count as disks. The second term is the chord-to-length ratio
    of a contour from border to border, 1 for a straight line and 0 for closed contours. Masks of
    a few pixels give 0.

    Args:
        mask: `(B, 1, H, W)`, float32, in [0, 1].
        gradient: `(B, 2, cells, cells)`, from `contour_gradient`.
        window: window around the mask.
        bbox: `(B, 4)`, `(x0, y0, x1, y1)` in pixels, not empty.

    Returns:
        `(B,)`, float32 in [0, 1].
    """
    area = mask.sum((1, 2, 3)) / window.cell**2
    length = _norm(gradient).sum((1, 2)) + _TINY
    roundness = (4 * math.pi * area / _mirrors(mask, bbox) + _TINY).sqrt() / length
    chord = gradient.sum((2, 3)).square().sum(1)
    straightness = (chord + _TINY**2).sqrt() / length
    return (1 - torch.maximum(roundness, straightness)).clamp(0, 1)


def boundary_smoothness(mask: Tensor, gradient: Tensor, window: Window) -> Tensor:
    """Compute the boundary smoothness, the directional coherence of the contour.

    `s = C - C_disk + 1`, clamped to [0, 1], with the coherence `C = sum(l1 - l2) / sum(l1 + l2)` of
    the eigenvalues l1, l2 of the structure tensor `G * (grad m grad m^T)`.

    G is a Gaussian of 2.5 cells, about 2 % of the mask's longer side and at least 2.5 pixels. C is
    1 for a contour that is straight within G. `C_disk = exp(-2 * 2.5^2 / r^2)` is the coherence of
    a disk of the same area with radius r in cells, and corrects for the curvature of small masks. A
    long smooth shape has a high edge complexity and a high smoothness. A mask without a contour
    gives 1.

    Args:
        mask: `(B, 1, H, W)`, float32, in [0, 1].
        gradient: `(B, 2, cells, cells)`, from `contour_gradient`.
        window: window around the mask.

    Returns:
        `(B,)`, float32 in [0, 1].
    """
    gx, gy = gradient[:, :1], gradient[:, 1:]
    products = torch.cat([gx * gx - gy * gy, 2 * gx * gy, gx * gx + gy * gy], dim=1)
    side = 2 * math.ceil(2.5 * _COHERENCE_SCALE) + 1
    scale = (_COHERENCE_SCALE, _COHERENCE_SCALE)
    tensor: Tensor = gaussian_blur2d(products, (side, side), scale, "constant")
    aligned = _norm(tensor[:, :2]).sum((1, 2))
    coherence = (aligned + _TINY) / (tensor[:, 2].sum((1, 2)) + _TINY)
    radius_squared = mask.sum((1, 2, 3)) / (math.pi * window.cell**2)
    of_disk = torch.exp(-2 * _COHERENCE_SCALE**2 / (radius_squared + _TINY))
    return (coherence - of_disk + 1).clamp(0, 1)


def _mirrors(mask: Tensor, bbox: Tensor) -> Tensor:
    width, height = (bbox[:, 2:] - bbox[:, :2]).float().unbind(1)
    left_right = (mask[..., 0] - mask[..., -1]).sum((1, 2)).abs() / height
    top_bottom = (mask[..., 0, :] - mask[..., -1, :]).sum((1, 2)).abs() / width
    return (1 + left_right.clamp(max=1)) * (1 + top_bottom.clamp(max=1))


def _norm(vectors: Tensor) -> Tensor:
    """Return the length of `(B, 2, ...)` over dim 1, with a finite gradient and 0 at zero."""
    return (vectors.square().sum(1) + _TINY**2).sqrt() - _TINY
