"""Input checks of the mask functions."""

from __future__ import annotations

import math
from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_ROUNDING = 1e-5
"""Allowed overshoot of [0, 1], for rounding by resampling."""

_CHECKED: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
"""Tensor version at the last check of a mask's values; in-place changes increment the version."""


def check_mask(mask: Tensor) -> Tensor:
    """Check a mask, and convert it to float32.

    Values are checked once per tensor and again after in-place changes, but not inside
    `torch.compile`. On CUDA the check synchronizes. Values may exceed [0, 1] by 1e-5, for rounding
    by resampling.

    Args:
        mask: `(B, 1, H, W)`, floating point, in [0, 1], pixel space; 1 = remove.

    Returns:
        The same values in float32, `(B, 1, H, W)`, with the graph of `mask`.

    Raises:
        TypeError: if `mask` is not a tensor, or not floating point.
        ValueError: if the shape is not (B, 1, H, W), the mask has no elements, or a value is NaN or
            outside [0, 1].

    Example:
        >>> check_mask(torch.full((1, 1, 2, 2), 255.0))
        Traceback (most recent call last):
        ValueError: Expected `mask` to have values in [0, 1], but got values in [255, 255]; \
divide by 255.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"Expected `mask` to be a torch.Tensor, but got {type(mask).__name__}.")
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(
            f"Expected `mask` to have shape (B, 1, H, W), but got {tuple(mask.shape)}."
        )
    if 0 in mask.shape:
        raise ValueError(f"Expected `mask` to have elements, but got {tuple(mask.shape)}.")
    if not mask.is_floating_point():
        raise TypeError(_dtype_message(mask))
    if not is_checked(mask):
        low, high = _value_range(mask, "mask")
        if low < -_ROUNDING or high > 1 + _ROUNDING:
            raise ValueError(_range_message("mask", low, high))
        mark_checked(mask)
    values = mask.float()
    if values is not mask:
        mark_checked(values)
    return values


def mark_checked(mask: Tensor) -> Tensor:
    """Mark the values of a mask as valid, so that `check_mask` skips them.

    Args:
        mask: mask computed from checked masks.

    Returns:
        The same mask.
    """
    # torch.compile cannot trace this; inference tensors have no version.
    if not torch.compiler.is_compiling() and not mask.is_inference():
        _CHECKED[mask] = mask._version
    return mask


def is_checked(mask: Tensor) -> bool:
    """Return whether a mask's values have been checked since its last in-place change."""
    if torch.compiler.is_compiling() or mask.is_inference():
        return False
    return _CHECKED.get(mask) == mask._version


def check_image(image: Tensor, mask: Tensor) -> Tensor:
    """Check the image of a mask, and convert it to float32.

    Args:
        image: `(B, 3, H, W)`, floating point, in [0, 1].
        mask: `(B, 1, H, W)`, checked.

    Returns:
        The same values in float32, `(B, 3, H, W)`, with the graph of `image`.

    Raises:
        TypeError: if `image` is not a tensor, or not floating point.
        ValueError: if the shape does not match the mask, or a value is NaN or outside [0, 1].

    Example:
        >>> check_image(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 4, 4))
        Traceback (most recent call last):
        ValueError: Expected `image` to have shape (1, 3, 4, 4), but got (1, 3, 8, 8).
    """
    if not isinstance(image, Tensor):
        raise TypeError(f"Expected `image` to be a torch.Tensor, but got {type(image).__name__}.")
    expected = (mask.shape[0], 3, *mask.shape[2:])
    if tuple(image.shape) != expected:
        raise ValueError(
            f"Expected `image` to have shape {expected}, but got {tuple(image.shape)}."
        )
    if not image.is_floating_point():
        raise TypeError(
            f"Expected `image` to be floating point, but got {image.dtype}; "
            "convert with image.float() / 255."
        )
    low, high = _value_range(image, "image")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(_range_message("image", low, high))
    return image.float()


def check_fit(image: Tensor, mask: Tensor, name: str = "image") -> None:
    """Check that an image of any range and number of channels has the size of a mask.

    Args:
        image: `(B, C, H, W)`, floating point.
        mask: `(B, 1, H, W)`, already checked.
        name: the argument's name in the message.

    Raises:
        TypeError: `image` is no tensor or not floating point.
        ValueError: the shape does not fit the mask's.

    Example:
        >>> check_fit(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 4, 4))
        Traceback (most recent call last):
        ValueError: Expected `image` to have shape (B, C, H, W) for a mask of (1, 1, 4, 4), but \
got (1, 3, 8, 8).
    """
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"Expected `{name}` to be a floating-point tensor, but got {kind}.")
    expected = (mask.shape[0], *mask.shape[2:])
    if image.ndim != 4 or (image.shape[0], *image.shape[2:]) != expected:
        raise ValueError(
            f"Expected `{name}` to have shape (B, C, H, W) for a mask of {tuple(mask.shape)}, but "
            f"got {tuple(image.shape)}."
        )


def check_pair(first: Tensor, second: Tensor, mask: Tensor, names: tuple[str, str]) -> None:
    """Check that two images have one shape and dtype, and the size of a mask.

    Args:
        first: `(B, C, H, W)`, floating point.
        second: the same shape and dtype.
        mask: `(B, 1, H, W)`, already checked.
        names: the arguments' names in the message.

    Raises:
        TypeError: an image is no tensor or not floating point, or the dtypes differ.
        ValueError: shapes do not fit.

    Example:
        >>> image = torch.zeros(1, 3, 4, 4)
        >>> check_pair(image, image.double(), image[:, :1], ("prediction", "source"))
        Traceback (most recent call last):
        TypeError: Expected `source` to have the dtype of `prediction`, torch.float32, but got \
torch.float64.
    """
    check_fit(first, mask, names[0])
    check_fit(second, mask, names[1])
    if second.shape != first.shape:
        raise ValueError(
            f"Expected `{names[1]}` to have the shape of `{names[0]}`, {tuple(first.shape)}, but "
            f"got {tuple(second.shape)}."
        )
    if second.dtype != first.dtype:
        raise TypeError(
            f"Expected `{names[1]}` to have the dtype of `{names[0]}`, {first.dtype}, but got "
            f"{second.dtype}."
        )


def check_size(size: tuple[int, int], name: str) -> tuple[int, int]:
    """Check a size (rows, columns).

    Args:
        size: two integers, each at least 1.
        name: name of the argument for error messages.

    Returns:
        `(rows, columns)`.

    Raises:
        ValueError: if `size` is not two integers >= 1.

    Example:
        >>> check_size((4, 0), "grid_size")
        Traceback (most recent call last):
        ValueError: Expected `grid_size` to be two integers >= 1 (rows, columns), but got (4, 0).
    """
    wrong = not isinstance(size, tuple | list) or len(size) != 2
    if wrong or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in size):
        raise ValueError(
            f"Expected `{name}` to be two integers >= 1 (rows, columns), but got {size}."
        )
    return size[0], size[1]


def check_integer(value: int, name: str, least: int) -> int:
    """Check an integer argument.

    Args:
        value: the integer.
        name: name of the argument for error messages.
        least: smallest allowed value.

    Returns:
        The same value.

    Raises:
        ValueError: if `value` is not an integer >= `least`, or is a bool.

    Example:
        >>> check_integer(0, "width", 1)
        Traceback (most recent call last):
        ValueError: Expected `width` to be an integer >= 1, but got 0.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"Expected `{name}` to be an integer >= {least}, but got {value!r}.")
    return value


def _value_range(values: Tensor, name: str) -> tuple[float, float]:
    """Return the minimum and maximum with one synchronization; (0, 1) if values are unavailable."""
    if torch.compiler.is_compiling() or values.is_meta:
        return 0.0, 1.0
    least, greatest = torch.aminmax(values.detach())
    low, high = torch.stack([least.float(), greatest.float()]).tolist()
    if math.isnan(low):
        raise ValueError(f"Expected `{name}` to be free of NaN, but got NaN values.")
    return low, high


def _dtype_message(mask: Tensor) -> str:
    expected = f"Expected `mask` to be floating point in [0, 1], but got {mask.dtype}; "
    if mask.dtype == torch.bool:
        return expected + "convert with mask.float()."
    if mask.is_complex():
        return expected + "convert with mask.real."
    return expected + "convert with mask.float() / 255 for values 0/255, or mask.float() for 0/1."


def _range_message(name: str, low: float, high: float) -> str:
    if low >= 0 and high > 2:
        advice = "divide by 255"
    elif low >= -1 - _ROUNDING and high <= 1 + _ROUNDING:
        advice = f"map [-1, 1] to [0, 1] with ({name} + 1) / 2"
    else:
        advice = f"clamp it with {name}.clamp(0, 1) if the values are an overshoot"
    return (
        f"Expected `{name}` to have values in [0, 1], but got values in [{low:g}, {high:g}]; "
        f"{advice}."
    )
