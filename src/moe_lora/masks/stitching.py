"""Put an edited crop back into its image at full resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.compositing import composite
from moe_lora.masks.crops import CropBox
from moe_lora.masks.laplace import harmonic_extension
from moe_lora.masks.seam_correction import correct_seam
from moe_lora.masks.validation import check_fit, check_mask, check_pair


def stitch(
    source: Tensor,
    edited: Tensor,
    reduced: Tensor,
    mask: Tensor,
    box: CropBox,
    *,
    prediction: Tensor | None = None,
    strength: float = 0.5,
) -> Tensor:
    """Put an edited crop back into its image at full resolution.

    out = m · up(y + strength · s) + (1 - m) · (x + up(h)),  where `x` is the source, `y` the edited
    crop, `m` the mask, `up` bilinear interpolation, `h` the change `y - reduced`, known where the
    reduced mask is 0, and `s`, in the reduced mask, the step `x + up(h) - up(prediction)` along the
    mask's edge, averaged over the part of each reduced pixel outside the mask; both are continued
    harmonically into the mask, see `harmonic_extension`

    A crop that was reduced for the model has lost its detail. Inside the mask nothing else is
    known; outside, the source keeps its detail, and only what the edit changed is added to it. The
    seam is corrected as by `correct_seam`, but the equations are solved at the size of the reduced
    crop, so that the cost hardly depends on the image. A crop that was not reduced is put in as it
    is, after `correct_seam`.

    Args:
        source: `(B, C, H, W)`, in [0, 1].
        edited: `(B, C, *box.size)`, in [0, 1], what became of `reduced`: in the mask the
            prediction; outside, such as by `keep_source`, equal to `reduced` where nothing changes.
        reduced: the same shape and range, the crop of the source reduced to `box.size`.
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove. Soft values weigh as they are.
        box: of the crop.
        prediction: the same shape and range as `edited`, the model's image that `edited` was made
            of; without it the seam stays as it is.
        strength: share of the step along the mask's edge that is taken out, in [0, 1].

    Returns:
        `(B, C, H, W)`, in [0, 1], in the dtype of `source`, with gradient to `source`, `edited`,
        `prediction` and `mask`. Outside the box it is the source to the last bit, and also in the
        box where the mask is 0 and `edited` equals `reduced` in the adjacent pixels.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.
        TypeError: an image is not floating point.
        ValueError: shapes do not fit, dtypes differ, or `strength` is not in [0, 1].

    Source: Pérez, Gangnet, Blake, "Poisson image editing", 2003, equation 9, the membrane
        interpolant, for `h` and `s`.

    Example:
        >>> source, mask = torch.full((1, 1, 2, 8), 0.5), torch.zeros(1, 1, 2, 8)
        >>> mask[..., :2] = 1
        >>> reduced = torch.full((1, 1, 1, 4), 0.5)
        >>> edited = torch.tensor([[[[0.1, 0.5, 0.5, 0.5]]]])
        >>> stitch(source, edited, reduced, mask, CropBox(0, 0, 2, 8, size=(1, 4)))[0, 0, 0]
        tensor([0.1000, 0.2000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000])
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"Expected `strength` to be in [0, 1], but got {strength}.")
    mask = check_mask(mask).clamp(0, 1)
    part, inside = box.cut(source), box.cut(mask)
    check_fit(part, inside, "source")
    small = F.adaptive_max_pool2d(inside, box.size)
    check_pair(edited, reduced, small, ("edited", "reduced"))
    if prediction is not None:
        check_pair(edited, prediction, small, ("edited", "prediction"))
    if edited.dtype != source.dtype or edited.shape[1] != source.shape[1]:
        raise ValueError(
            f"Expected `edited` to have the dtype and channels of `source`, {source.dtype} and "
            f"{source.shape[1]}, but got {edited.dtype} and {edited.shape[1]}."
        )
    if box.size != (box.height, box.width):
        merged = _enlarge_edit(part, edited, reduced, inside, small, prediction, strength)
    elif prediction is not None:
        merged = correct_seam(edited, prediction, inside, strength=strength)
    else:
        merged = edited
    out = source.clone()
    box.cut(out).copy_(merged)
    return out


def _enlarge_edit(
    part: Tensor,
    edited: Tensor,
    reduced: Tensor,
    mask: Tensor,
    small: Tensor,
    prediction: Tensor | None,
    strength: float,
) -> Tensor:
    """Return the crop at full resolution, in float32 or more."""
    wide = torch.promote_types(part.dtype, torch.float32)
    with torch.autocast(mask.device.type, enabled=False):
        change = harmonic_extension(edited.to(wide) - reduced.to(wide), small)
        outside = part.to(wide) + _enlarge(change, mask)
        fill = edited.to(wide)
        if prediction is not None and strength:
            step = _step(outside, prediction.to(wide), mask)
            fill = fill + torch.where(small > 0, strength * step, 0)
        return composite(_enlarge(fill, mask), outside, mask).clamp(0, 1)


def _step(outside: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
    """Return the step along the mask's edge at the size of the prediction, continued inside."""
    size = (prediction.shape[2], prediction.shape[3])
    weight = 1 - mask.to(prediction.dtype)
    step = F.adaptive_avg_pool2d((outside - _enlarge(prediction, mask)) * weight, size)
    share = F.adaptive_avg_pool2d(weight, size)
    unknown = share == 0
    return harmonic_extension(step / torch.where(unknown, 1, share), unknown.float())


def _enlarge(values: Tensor, like: Tensor) -> Tensor:
    size = (like.shape[2], like.shape[3])
    return F.interpolate(values, size, mode="bilinear", align_corners=False)
