"""Seam error: intensity steps across the mask's edge."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks import check_mask
from moe_lora.metrics.metric_values import MetricValues
from moe_lora.metrics.validation import check_pair


def seam_error(prediction: Tensor, target: Tensor, mask: Tensor) -> MetricValues:
    """Compute the error of intensity steps across the mask's edge.

    mean over (p, q) and channels of abs(d(p) - d(q)), d = prediction - target

    The pairs (p, q) are horizontal and vertical neighbors with p inside and q outside the mask. A
    constant error of c inside the mask only gives exactly c; a constant error everywhere gives 0.

    Args:
        prediction: `(B, C, H, W)`, image in [0, 1].
        target: `(B, C, H, W)`, image in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove; thresholded at 0.5.

    Returns:
        `(B,)`, in intensity per pixel, in [0, 2]; `pixels` is the number of pairs. Samples with an
        empty or full mask are absent.

    Raises:
        TypeError, ValueError: if an image is invalid, outside [0, 1] or of another shape, or if
            `mask` is invalid, see `moe_lora.masks.check_mask`.

    Example:
        >>> mask = torch.zeros(1, 1, 8, 8)
        >>> mask[..., 2:6, 2:6] = 1
        >>> target = torch.full((1, 3, 8, 8), 0.5)
        >>> found = seam_error(target + 0.25 * mask, target, mask)
        >>> found.mean(), found.pixels
        (0.25, tensor([16]))
    """
    first, second = check_pair(prediction, target, names=("prediction", "target"))
    inside = check_mask(mask).detach() >= 0.5
    if (inside.shape[0], *inside.shape[2:]) != (first.shape[0], *first.shape[2:]):
        raise ValueError(
            f"Expected `mask` to have the batch and image size of `prediction`, "
            f"{tuple(first.shape)}, but got "
            f"{tuple(inside.shape)}."
        )
    difference = first - second
    total = difference.new_zeros(len(first))
    pairs = torch.zeros(len(first), dtype=torch.int64, device=first.device)
    for axis in (2, 3):
        step = difference.diff(dim=axis).abs().mean(1, keepdim=True)
        across = inside.narrow(axis, 1, inside.shape[axis] - 1) != inside.narrow(
            axis, 0, inside.shape[axis] - 1
        )
        total += torch.where(across, step, 0).flatten(1).sum(1)
        pairs += across.flatten(1).sum(1)
    return MetricValues(total / pairs.clamp(min=1), pairs)
