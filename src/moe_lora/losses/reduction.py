"""Penalty, region mean and batch mean of the region losses."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from moe_lora.masks import check_mask
from moe_lora.masks.validation import mark_checked

Reduction = Literal["mean", "none"]

CHARBONNIER_EPS = 1e-3
"""Half-width of the quadratic part of the penalty: a quarter of an 8-bit step in [0, 1]."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision to float32, since half-precision sums over an image lose small errors.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def charbonnier(difference: Tensor, eps: float = CHARBONNIER_EPS) -> Tensor:
    """Compute the Charbonnier penalty, an L1 penalty that is smooth at zero.

    sqrt(d² + eps²) - eps, computed as d² / (sqrt(d² + eps²) + eps), which is exactly 0 at d = 0.

    Args:
        difference: tensor of any shape.
        eps: half-width of the quadratic part, > 0, in the unit of `difference`.

    Returns:
        The penalty, element by element, >= 0.

    Example:
        >>> charbonnier(torch.tensor([0.0, -3.0]), eps=4.0)
        tensor([0., 1.])
    """
    square = difference.square()
    return square / ((square + eps**2).sqrt() + eps)


def region_mean(error: Tensor, region: Tensor) -> Tensor:
    """Average an error over a region, sample by sample.

    sum(region * error) / (C * max(sum(region), 1)); 0, with a graph, if the region is empty.

    The mean is over the area of the region, not of the image, so that small and large masks have
    equal influence. Regions of less than one pixel in total, such as rounding errors of a resized
    mask, have less.

    Args:
        error: `(B, C, H, W)`, >= 0.
        region: `(B, 1, H, W)`, in [0, 1]; weight of each pixel.

    Returns:
        `(B,)`.

    Example:
        >>> error = torch.tensor([[[[4.0, 8.0, 100.0]]]])
        >>> region_mean(error, torch.tensor([[[[1.0, 1.0, 0.0]]]]))
        tensor([6.])
        >>> region_mean(error, torch.zeros(1, 1, 1, 3))
        tensor([0.])
    """
    area = region.flatten(1).sum(dim=1).clamp(min=1)
    return (error * region).flatten(1).sum(dim=1) / (error.shape[1] * area)


def reduce_batch(per_sample: Tensor, reduction: Reduction) -> Tensor:
    """Average over the batch, or return the values per sample.

    Args:
        per_sample: `(B,)`.
        reduction: "mean" or "none".

    Returns:
        A scalar for "mean", `(B,)` for "none".

    Raises:
        ValueError: if the reduction is unknown.

    Example:
        >>> reduce_batch(torch.tensor([1.0, 3.0]), "mean")
        tensor(2.)
    """
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"Expected `reduction` to be one of {list(get_args(Reduction))}, but got {reduction!r}."
        )
    return per_sample.mean() if reduction == "mean" else per_sample


def pixel_difference(prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Check the inputs of a region loss, and subtract the target from the prediction.

    The filters of the region losses are linear, so that one filtered difference equals the
    difference of two filtered images.

    Args:
        prediction: `(B, 3, H, W)`, image in [0, 1]; values outside are allowed.
        target: `(B, 3, H, W)`, image in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1]; 1 = remove.

    Returns:
        prediction - target, and the mask, both in the same dtype, float32 or wider.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.
        ValueError: if shapes do not match.

    Example:
        >>> ones = torch.ones(1, 3, 2, 2)
        >>> pixel_difference(ones, 0.25 * ones, ones[:, :1])[0].mean()
        tensor(0.7500)
    """
    if prediction.ndim != 4:
        raise ValueError(
            f"Expected `prediction` to have shape (B, 3, H, W), but got {tuple(prediction.shape)}."
        )
    if target.shape != prediction.shape:
        raise ValueError(
            f"Expected `target` to have the shape of `prediction`, {tuple(prediction.shape)}, "
            f"but got {tuple(target.shape)}."
        )
    check_mask(mask)
    batch, _, height, width = prediction.shape
    if mask.shape != (batch, 1, height, width):
        raise ValueError(
            f"Expected `mask` to have shape (B, 1, H, W) = {(batch, 1, height, width)}, "
            f"but got {tuple(mask.shape)}."
        )
    difference = at_least_float32(prediction) - at_least_float32(target)
    return difference, mark_checked(mask.to(difference.dtype).clamp(0, 1))
