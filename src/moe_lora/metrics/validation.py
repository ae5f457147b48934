"""Input checks of the metrics."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 1e-5
"""Allowed overshoot of [0, 1], for rounding by resampling."""


def check_pair(
    prediction: Tensor, target: Tensor, *, names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """Check two batches of images, and convert them to float64.

    Args:
        prediction: `(B, C, H, W)`, floating point, in [0, 1].
        target: `(B, C, H, W)`, floating point, in [0, 1].
        names: names of the arguments for error messages.

    Returns:
        Both, detached, in float64, clamped to [0, 1].

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if shapes differ, or are not (B, C, H, W), or a value is NaN or outside [0, 1].
    """
    first = check_images(prediction, names[0])
    second = check_images(target, names[1])
    if second.shape != first.shape:
        raise ValueError(
            f"Expected `{names[1]}` to have the shape of `{names[0]}`, {tuple(first.shape)}, but "
            f"got {tuple(second.shape)}."
        )
    return first, second


def check_images(images: Tensor, name: str) -> Tensor:
    """Check a batch of images, and convert it to float64.

    Args:
        images: `(B, C, H, W)`, floating point, in [0, 1].
        name: name of the argument for error messages.

    Returns:
        The images, detached, in float64, clamped to [0, 1].

    Raises:
        TypeError: if `images` is not a floating-point tensor.
        ValueError: if the shape is not (B, C, H, W), or a value is NaN or outside [0, 1].
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"Expected `{name}` to be a floating-point tensor, but got {kind}.")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"Expected `{name}` to have shape (B, C, H, W), but got {tuple(images.shape)}."
        )
    values = images.detach().double()
    low, high = torch.stack(torch.aminmax(values)).tolist()
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise ValueError(
            f"Expected `{name}` to have values in [0, 1], but got values in [{low:g}, {high:g}]."
        )
    return values.clamp(0, 1)


def check_region(region: Tensor | None, images: Tensor) -> Tensor:
    """Check a region, and replace `None` by all pixels.

    Args:
        region: `(B, 1, H, W)`, bool.
        images: `(B, C, H, W)`.

    Returns:
        `(B, 1, H, W)`, bool.

    Raises:
        TypeError: if `region` is not a bool tensor.
        ValueError: if the shape does not match the images.
    """
    expected = (images.shape[0], 1, *images.shape[2:])
    if region is None:
        return torch.ones(expected, dtype=torch.bool, device=images.device)
    if not isinstance(region, Tensor) or region.dtype != torch.bool:
        kind = region.dtype if isinstance(region, Tensor) else type(region).__name__
        raise TypeError(f"Expected `region` to be a bool tensor, but got {kind}.")
    if tuple(region.shape) != expected:
        raise ValueError(
            f"Expected `region` to have shape (B, 1, H, W) = {expected}, but got "
            f"{tuple(region.shape)}."
        )
    return region
