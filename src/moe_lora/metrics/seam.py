"""The step along a mask's edge that tells where a picture was mended."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks import check_mask
from moe_lora.metrics.metric_values import Measured
from moe_lora.metrics.validation import check_pair


def seam_error(result: Tensor, truth: Tensor, mask: Tensor) -> Measured:
    """Measure how far the slope across the mask's edge is off.

    With `d = result - truth`: the mean over all pairs of neighbors `(p, q)`, horizontal or
    vertical, of which `p` is inside the mask and `q` outside, and over the channels, of
    abs(d(p) - d(q)). A result that is too bright by `c` inside the mask and right outside has an
    error of exactly `c`; one that is too bright by `c` everywhere has no seam, and an error of 0.

    Args:
        result: `(B, C, H, W)`, in [0, 1].
        truth: the same shape.
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove; cut at 0.5.

    Returns:
        In units of intensity per pixel, in [0, 2], `(B,)`; `pixels` counts the pairs. Missing where
        the mask has no edge: empty, or full.

    Raises:
        TypeError, ValueError: for images that are none, are outside [0, 1] or do not fit, or a
            mask that `moe_lora.masks.check_mask` refuses.

    Example:
        >>> mask = torch.zeros(1, 1, 8, 8)
        >>> mask[..., 2:6, 2:6] = 1
        >>> truth = torch.full((1, 3, 8, 8), 0.5)
        >>> found = seam_error(truth + 0.25 * mask, truth, mask)
        >>> found.mean(), found.pixels
        (0.25, tensor([16]))
    """
    first, second = check_pair(result, truth, names=("result", "truth"))
    inside = check_mask(mask).detach() >= 0.5
    if (inside.shape[0], *inside.shape[2:]) != (first.shape[0], *first.shape[2:]):
        raise ValueError(
            f"Expected `mask` to fit images of shape {tuple(first.shape)}, but got "
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
    return Measured(total / pairs.clamp(min=1), pairs)
