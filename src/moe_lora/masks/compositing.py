"""Compositing of a prediction with the source outside the mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.distance import distance_to_mask
from moe_lora.masks.validation import check_integer, check_mask, check_pair


def composite(prediction: Tensor, source: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """Keep the source outside the mask, and blend over a soft edge.

    out = source + w · (prediction - source),  w = max(mask, s²·(3 - 2·s)),
    s = clamp(1 - d / (feather + 1), 0, 1), where `d` is a pixel's Euclidean distance to the nearest
    one with mask >= 0.5

    The edge lies outside the mask, so that nothing of the object comes back: `w` is 1 in a mask of
    zeros and ones, and 0 from `feather + 1` pixels away from it. Where `w` is 0 the output is the
    source to the last bit, and where `w` is 1 the prediction. A model that decodes by a VAE changes
    every pixel; this undoes it. It also brings back shadows and reflections outside the mask;
    `keep_source` does not.

    Args:
        prediction: `(B, C, H, W)`, the model's image, in any range.
        source: the same shape and range, the image with the object.
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove. Soft values weigh as they are;
            with a feather, those from 0.5 on weigh 1.
        feather: width of the soft edge in pixels, an integer >= 0; 0 for none.

    Returns:
        `(B, C, H, W)`, in the dtype of `prediction`, with gradient to `prediction`, `source` and
        `mask`.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.
        TypeError: `prediction` or `source` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, or `feather` is not an integer >= 0.

    Example:
        >>> mask = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
        >>> prediction, source = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
        >>> composite(prediction, source, mask)
        tensor([[[[1., 0., 0., 0.]]]])
        >>> composite(prediction, source, mask, feather=1)
        tensor([[[[1.0000, 0.5000, 0.0000, 0.0000]]]])
    """
    if isinstance(feather, bool) or not isinstance(feather, int) or feather < 0:
        raise ValueError(f"Expected `feather` to be an integer >= 0, but got {feather!r}.")
    mask = check_mask(mask).clamp(0, 1)
    check_pair(prediction, source, mask, ("prediction", "source"))
    with torch.autocast(mask.device.type, enabled=False):
        weight = torch.maximum(mask, _soft_edge(mask, feather)) if feather else mask
        # lerp is exact at both ends; in half precision the weight's steps would show.
        wide = torch.promote_types(prediction.dtype, torch.float32)
        mixed = torch.lerp(source.to(wide), prediction.to(wide), weight.to(wide))
        mixed = torch.where(weight > 0, mixed, source.to(wide))
    return mixed.to(prediction.dtype)


def keep_source(
    prediction: Tensor,
    source: Tensor,
    mask: Tensor,
    reconstruct: Callable[[Tensor], Tensor],
    *,
    low: float = 0.02,
    high: float = 0.04,
    window: int = 7,
) -> Tensor:
    """Keep the source outside the mask, but for what the model changed there on purpose.

    out = m · y + (1 - m) · (x + w · (y - r)),  r = reconstruct(m · y + (1 - m) · x),
    w = s² · (3 - 2·s),  s = clamp((a - low) / (high - low), 0, 1), where `y` is the prediction,
    `x` the source, `m` the mask, and `a` the mean of abs(y - r) over the channels and a square of
    `window` pixels

    A model that decodes by a VAE changes every pixel, and `r` tells how: it is what the
    autoencoder alone makes of the source with the prediction in it. Where the prediction is no
    different from `r`, the model left the image alone, and the source stays to the last bit. Where
    it is, such as in a shadow that went with the object, the difference is added to the source,
    whose detail stays.

    Args:
        prediction: `(B, C, H, W)`, in [0, 1], the model's image.
        source: the same shape and range, the image with the object.
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove. Soft values weigh as they are.
        reconstruct: encodes and decodes images by the model's autoencoder, `(B, C, H, W)` in [0, 1]
            to the same shape, range and dtype. Called once.
        low: local mean of `abs(y - r)` up to which the source stays, >= 0.
        high: local mean of `abs(y - r)` from which the difference is added in full, > `low`.
        window: side of the square in pixels, odd and >= 1; at the border of the image the mean is
            over the part in the image.

    Returns:
        `(B, C, H, W)`, in [0, 1], in the dtype of `prediction`, with gradient to `prediction`,
        `source`, `mask` and through `reconstruct`.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.
        TypeError: an image is not floating point, or dtypes differ.
        ValueError: shapes do not fit, not 0 <= `low` < `high`, or `window` is not odd and >= 1.

    Example:
        >>> mask = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]])
        >>> source = torch.tensor([[[[0.9, 0.2, 0.5, 0.5]]]])
        >>> prediction = torch.tensor([[[[0.4, 0.4, 0.51, 0.49]]]])
        >>> keep_source(prediction, source, mask, lambda image: image, window=1)
        tensor([[[[0.4000, 0.4000, 0.5000, 0.5000]]]])
    """
    if not 0 <= low < high:
        raise ValueError(f"Expected 0 <= `low` < `high`, but got {low} and {high}.")
    if check_integer(window, "window", 1) % 2 == 0:
        raise ValueError(f"Expected `window` to be odd, but got {window}.")
    mask = check_mask(mask).clamp(0, 1)
    check_pair(prediction, source, mask, ("prediction", "source"))
    reconstruction = reconstruct(composite(prediction, source, mask))
    check_pair(prediction, reconstruction, mask, ("prediction", "reconstruct(image)"))
    with torch.autocast(mask.device.type, enabled=False):
        wide = torch.promote_types(prediction.dtype, torch.float32)
        change = prediction.to(wide) - reconstruction.to(wide)
        amount = _local_mean(change.abs().mean(1, keepdim=True), window)
        rise = ((amount - low) / (high - low)).clamp(0, 1)
        weight = rise.square() * (3 - 2 * rise)
        background = source.to(wide) + weight * change
        mixed = composite(prediction.to(wide), background, mask).clamp(0, 1)
    return mixed.to(prediction.dtype)


def _soft_edge(mask: Tensor, feather: int) -> Tensor:
    """Return `s²·(3 - 2·s)` of `composite`, `(B, 1, H, W)`."""
    reach = feather + 1
    nearness = 1 - distance_to_mask(mask, reach) / reach
    return nearness.square() * (3 - 2 * nearness)


def _local_mean(values: Tensor, window: int) -> Tensor:
    """Average over a square of pixels, at the border over those in the image, `(B, 1, H, W)`."""
    size, padding = (window, 1), (window // 2, 0)
    columns = F.avg_pool2d(values, size, 1, padding, count_include_pad=False)
    return F.avg_pool2d(columns, size[::-1], 1, padding[::-1], count_include_pad=False)
