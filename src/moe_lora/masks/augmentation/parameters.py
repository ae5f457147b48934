"""Parameters and coordinates of the augmentations."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks.analysis.area import bounding_box
from moe_lora.masks.validation import check_mask


def per_sample(
    value: float | Tensor, mask: Tensor, name: str, low: float, high: float = torch.inf
) -> Tensor:
    """Check a parameter, and expand it to `(B, 1, 1, 1)`.

    Args:
        value: a scalar or `(B,)`.
        mask: `(B, 1, H, W)`.
        name: name of the argument for error messages.
        low: smallest allowed value.
        high: largest allowed value.

    Returns:
        `(B, 1, 1, 1)`, float32.

    Raises:
        ValueError: if the shape is another, or a value is out of range.

    Example:
        >>> per_sample(2, torch.zeros(3, 1, 8, 8), "radius", 0).shape
        torch.Size([3, 1, 1, 1])
    """
    batch = len(mask)
    given = torch.as_tensor(value, dtype=torch.float32, device=mask.device)
    if given.shape not in ((), (batch,)):
        raise ValueError(
            f"Expected `{name}` to be a scalar or to have shape ({batch},), "
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
    """Check a mask, and threshold it at 0.5, without gradient.

    Example:
        >>> binary(torch.tensor([[[[0.2, 0.5]]]]))
        tensor([[[[0., 1.]]]])
    """
    return (check_mask(mask).detach() >= 0.5).float()


def extent(inside: Tensor) -> tuple[Tensor, ...]:
    """Return the bounding boxes `x0, y0, x1, y1` of masks, `(B, 1, 1, 1)` each, in pixels.

    Example:
        >>> mask = torch.zeros(1, 1, 4, 6)
        >>> mask[..., 1:3, 2:6] = 1
        >>> [int(edge) for edge in extent(mask)]
        [2, 1, 6, 3]
    """
    values = inside[:, 0]
    boxes = bounding_box(values.amax(2), values.amax(1), 0.5).float()
    return tuple(edge.view(-1, 1, 1, 1) for edge in boxes.unbind(1))


def pixel_centers(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coordinates of pixel centers, `x` `(W,)` and `y` `(H, 1)`.

    Example:
        >>> pixel_centers(torch.zeros(1, 1, 2, 2))[0]
        tensor([0.5000, 1.5000])
    """
    height, width = inside.shape[2:]
    x = torch.arange(width, device=inside.device) + 0.5
    y = torch.arange(height, device=inside.device) + 0.5
    return x, y[:, None]
