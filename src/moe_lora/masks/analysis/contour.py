"""The shape of a mask's contour: how long it is for its area, and how quickly it turns."""

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
    """Take the Sobel gradient of the lightly blurred mask, per cell of the window.

    Args:
        mask: `(B, 1, H, W)`, float32, in [0, 1].
        window: around the mask.

    Returns:
        `(B, 2, cells, cells)`, the derivatives in x and y per cell; zero outside the image, whose
        border is no contour.
    """
    cells = gaussian_blur2d(window.resample(mask), (3, 3), (_ANTIALIAS, _ANTIALIAS), "replicate")
    gradient: Tensor = spatial_gradient(cells, mode="sobel")[:, 0]
    return gradient * window.in_image


def edge_complexity(mask: Tensor, gradient: Tensor, window: Window, bbox: Tensor) -> Tensor:
    """Measure how much longer a contour is than it need be.

    `c = 1 - max(sqrt(4 pi A / k) / P, |integral of grad m| / P)`, clamped to [0, 1], with the
    area `A` and the length of the contour `P = integral of |grad m|`. The first term is the
    isoperimetric ratio, 1 for a disk. `k` continues a mask that is cut by the image's border as
    a mirror would: `k = k_x * k_y`, where `k_x = 1 + |left - right|` with the shares of the
    mask's height that lie on the left and right border, and so for `k_y`; a half disk on the
    border and a quarter disk in a corner are disks. The second term is chord over length of a
    contour from border to border, 1 where it is straight, and 0 for closed contours. A mask of
    one or a few pixels has no shape and gives 0.

    Args:
        mask: `(B, 1, H, W)`, float32, in [0, 1].
        gradient: `(B, 2, cells, cells)`, from `contour_gradient`.
        window: around the mask.
        bbox: `(B, 4)`, `(x0, y0, x1, y1)` in pixels, non-empty.

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
    """Measure how well neighboring pieces of the contour agree in direction.

    `s = C - C_disk + 1`, clamped to [0, 1], with the coherence `C = sum(l1 - l2) / sum(l1 + l2)`
    of the eigenvalues of the structure tensor `G * (grad m grad m^T)`, `G` a Gaussian of 2.5
    cells, about 2 % of the mask's longer side (never less than 2.5 pixels). `C` is 1 where the
    contour is straight within `G`. `C_disk = exp(-2 * 2.5^2 / r^2)` is what a disk of the same
    area has, `r` its radius in cells: a small mask is not rough for turning once around. A long
    smooth shape has a high `edge_complexity` and a high smoothness. A mask without contour
    gives 1.

    Args:
        mask: `(B, 1, H, W)`, float32, in [0, 1].
        gradient: `(B, 2, cells, cells)`, from `contour_gradient`.
        window: around the mask.

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
