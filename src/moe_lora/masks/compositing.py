"""Paste what was made inside the mask back into the untouched source."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks.distance import distance_to_mask
from moe_lora.masks.validation import check_mask


def composite(result: Tensor, source: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """Keep the source outside the mask, and blend over a soft edge.

    out = source + w · (result - source),  w = max(mask, s²·(3 - 2·s)),  s = clamp(1 - d / (feather
    + 1), 0, 1), where `d` is a pixel's Euclidean distance to the nearest one with mask >= 0.5

    The edge lies outside the mask, so that nothing of the object comes back: `w` is 1 in a mask of
    zeros and ones, and 0 from `feather + 1` pixels away from it. Where `w` is 0 the output is the
    source to the last bit, and where `w` is 1 the result. A model that decodes by a VAE changes
    every pixel; this undoes it. It also brings back shadows and reflections outside the mask, so
    the mask has to cover what shall go.

    Args:
        result: `(B, C, H, W)`, what a model made, in any range.
        source: the same shape and range, the picture before.
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove. Soft values weigh as they are;
            with a feather, those from 0.5 on weigh 1.
        feather: width of the soft edge in pixels, an integer >= 0; 0 for none.

    Returns:
        `(B, C, H, W)`, in the dtype of `result`, with gradient to `result`, `source` and `mask`.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.
        TypeError: `result` or `source` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, or `feather` is not an integer >= 0.

    Example:
        >>> mask = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
        >>> result, source = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
        >>> composite(result, source, mask)
        tensor([[[[1., 0., 0., 0.]]]])
        >>> composite(result, source, mask, feather=1)
        tensor([[[[1.0000, 0.5000, 0.0000, 0.0000]]]])
    """
    if isinstance(feather, bool) or not isinstance(feather, int) or feather < 0:
        raise ValueError(f"Expected `feather` to be an integer >= 0, but got {feather!r}.")
    mask = check_mask(mask).clamp(0, 1)
    _check_images(result, source, mask)
    with torch.autocast(mask.device.type, enabled=False):
        weight = torch.maximum(mask, _soft_edge(mask, feather)) if feather else mask
        # lerp is exact at both ends; in half precision the weight's steps would show.
        wide = torch.promote_types(result.dtype, torch.float32)
        mixed = torch.lerp(source.to(wide), result.to(wide), weight.to(wide))
        mixed = torch.where(weight > 0, mixed, source.to(wide))
    return mixed.to(result.dtype)


def _soft_edge(mask: Tensor, feather: int) -> Tensor:
    """Return `s²·(3 - 2·s)` of `composite`, `(B, 1, H, W)`."""
    reach = feather + 1
    nearness = 1 - distance_to_mask(mask, reach) / reach
    return nearness.square() * (3 - 2 * nearness)


def _check_images(result: Tensor, source: Tensor, mask: Tensor) -> None:
    for name, images in (("result", result), ("source", source)):
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"Expected `{name}` to be a floating-point tensor, but got {kind}.")
    expected = (mask.shape[0], *mask.shape[2:])
    if result.ndim != 4 or (result.shape[0], *result.shape[2:]) != expected:
        raise ValueError(
            f"Expected `result` to have shape (B, C, H, W) that fits a mask of "
            f"{tuple(mask.shape)}, but got {tuple(result.shape)}."
        )
    if source.shape != result.shape:
        raise ValueError(
            f"Expected `source` to have the shape of `result`, {tuple(result.shape)}, but got "
            f"{tuple(source.shape)}."
        )
    if source.dtype != result.dtype:
        raise TypeError(
            f"Expected `source` to have the dtype of `result`, {result.dtype}, but got "
            f"{source.dtype}."
        )
