"""What the augmentations of this package have in common: parameters and coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks.analysis.window import bounding_box
from moe_lora.masks.validation import check_mask


def per_sample(
    value: float | Tensor, mask: Tensor, name: str, low: float, high: float = torch.inf
) -> Tensor:
    """Return a parameter as `(B, 1, 1, 1)`, one number for each sample.

    Args:
        value: a number, or `(B,)`.
        mask: `(B, 1, H, W)`.
        name: the argument's name in the message.
        low: the least value allowed.
        high: the greatest.

    Raises:
        ValueError: for another shape, or a value out of range.

    Example:
        >>> per_sample(2, torch.zeros(3, 1, 8, 8), "radius", 0).shape
        torch.Size([3, 1, 1, 1])
    """
    batch = len(mask)
    given = torch.as_tensor(value, dtype=torch.float32, device=mask.device)
    if given.shape not in ((), (batch,)):
        raise ValueError(
            f"Expected `{name}` to be one number or to have shape ({batch},), "
            f"but got {tuple(given.shape)}."
        )
    least, greatest = given.min().item(), given.max().item()
    if not (low <= least and greatest <= high):
        raise ValueError(
            f"Expected `{name}` to be in [{low:g}, {high:g}], "
            f"but got values from {least:g} to {greatest:g}."
        )
    return given.expand(batch).view(batch, 1, 1, 1)


def binary(mask: Tensor) -> Tensor:
    """Check a mask, and return `mask >= 0.5` as 0.0 and 1.0, without gradient.

    Example:
        >>> binary(torch.tensor([[[[0.2, 0.5]]]]))
        tensor([[[[0., 1.]]]])
    """
    return (check_mask(mask).detach() >= 0.5).float()


def extent(inside: Tensor) -> tuple[Tensor, ...]:
    """Return the edges `x0, y0, x1, y1` of the boxes around masks, `(B, 1, 1, 1)` each, in pixels.

    Example:
        >>> mask = torch.zeros(1, 1, 4, 6)
        >>> mask[..., 1:3, 2:6] = 1
        >>> [int(edge) for edge in extent(mask)]
        [2, 1, 6, 3]
    """
    values = inside[:, 0]
    boxes = bounding_box(values.amax(2), values.amax(1), 0.5).float()
    return tuple(edge.view(-1, 1, 1, 1) for edge in boxes.unbind(1))


def middles(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of the middles of all pixels, `x` `(W,)` and `y` `(H, 1)`.

    Example:
        >>> middles(torch.zeros(1, 1, 2, 2))[0]
        tensor([0.5000, 1.5000])
    """
    height, width = inside.shape[2:]
    x = torch.arange(width, device=inside.device) + 0.5
    y = torch.arange(height, device=inside.device) + 0.5
    return x, y[:, None]
