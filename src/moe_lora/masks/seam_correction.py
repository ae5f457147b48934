"""Take the step along a mask's edge out of what was filled in."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks.laplace import harmonic_extension
from moe_lora.masks.validation import check_mask, check_pair


def correct_seam(
    image: Tensor, prediction: Tensor, mask: Tensor, *, strength: float = 0.5
) -> Tensor:
    """Shift the colors of a fill towards its surroundings: a membrane (Poisson) correction.

    out = image + strength · mask · h,  where `h` continues `image - prediction`, known where the
    mask is 0, harmonically into the mask, see `harmonic_extension`

    A decoder and a model miss the colors of the source a little, so that a fill pasted into it has
    an outline on smooth backgrounds. Along the edge `h` is that miss, and inside it fades smoothly.
    With a strength of 1 the gradients of `prediction` are kept and its colors are the image's,
    which is seamless cloning. Where the object's shadow or its color stays beside the mask,
    that draws it in; less strength does so less.

    Args:
        image: `(B, C, H, W)`, in [0, 1], the prediction composited with its surroundings by
            `composite` (with a feather of 0) or `keep_source`.
        prediction: the same shape and range, the model's image, which `image` was made of.
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove; the one that `image` was made
            with. Soft values weigh as they are.
        strength: share of the step that is taken out, in [0, 1].

    Returns:
        `(B, C, H, W)`, in [0, 1], in the dtype of `image`, with gradient to `image`,
        `prediction` and `mask`. Where the mask is 0 it is `image` to the last bit.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.
        TypeError: `image` or `prediction` is not floating point, or their dtypes differ.
        ValueError: shapes do not fit, or `strength` is not in [0, 1].

    Source: Pérez, Gangnet, Blake, "Poisson image editing", 2003, equation 9, the membrane
        interpolant, scaled by `strength`.

    Example:
        >>> mask = torch.tensor([[[[0.0, 1.0, 1.0, 0.0]]]])
        >>> prediction = torch.tensor([[[[0.5, 0.5, 0.7, 0.5]]]])
        >>> image = torch.where(mask > 0, prediction, 0.25)
        >>> correct_seam(image, prediction, mask, strength=1.0)
        tensor([[[[0.2500, 0.2500, 0.4500, 0.2500]]]])
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"Expected `strength` to be in [0, 1], but got {strength}.")
    mask = check_mask(mask).clamp(0, 1)
    check_pair(image, prediction, mask, ("image", "prediction"))
    if strength == 0:
        return image
    with torch.autocast(mask.device.type, enabled=False):
        wide = torch.promote_types(image.dtype, torch.float32)
        step = harmonic_extension(image.to(wide) - prediction.to(wide), mask)
        corrected = (image.to(wide) + strength * mask.to(wide) * step).clamp(0, 1)
        return torch.where(mask > 0, corrected.to(image.dtype), image)
