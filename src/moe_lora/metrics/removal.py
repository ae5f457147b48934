"""All metrics of a removal at once."""

from __future__ import annotations

from torch import Tensor, nn

from moe_lora.metrics.image import psnr, region_average, ssim_map
from moe_lora.metrics.metric_values import Measured
from moe_lora.metrics.perceptual import lpips
from moe_lora.metrics.regions import EFFECT_THRESHOLD, regions
from moe_lora.metrics.seam import seam_error


def measure(
    result: Tensor,
    truth: Tensor,
    mask: Tensor,
    source: Tensor | None = None,
    *,
    band_width: int | None = None,
    effect_threshold: float = EFFECT_THRESHOLD,
    lpips_model: nn.Module | None = None,
) -> dict[str, Measured]:
    """Measure a removal by PSNR and SSIM in every region, and by the error across the seam.

    Args:
        result: `(B, 3, H, W)`, in [0, 1], what a model made.
        truth: `(B, 3, H, W)`, in [0, 1], the picture as it should be.
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        source: `(B, 3, H, W)`, in [0, 1], the picture with the object; without it there is no
            effect region.
        band_width: of the boundary region, see `regions`.
        effect_threshold: of the effect region, see `regions`.
        lpips_model: of `load_lpips`; LPIPS is measured with it only.

    Returns:
        By name: `psnr/whole` in dB, `ssim/whole` and, with a model, `lpips/whole`, the same for
        `inside`, `outside`, `boundary` and `effect`, and `seam_error`.

    Raises:
        TypeError, ValueError: for images that are none, are outside [0, 1] or do not fit, or a
            mask that `moe_lora.masks.check_mask` refuses.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 1, 16, 16)
        >>> mask[..., 4:12, 4:12] = 1
        >>> truth = torch.full((1, 3, 16, 16), 0.5)
        >>> found = measure(truth + 0.1 * mask, truth, mask)
        >>> round(found["psnr/inside"].mean(), 4), found["psnr/outside"].mean()
        (20.0, 100.0)
        >>> round(found["seam_error"].mean(), 4)
        0.1
    """
    where = regions(
        mask,
        source,
        None if source is None else truth,
        band_width=band_width,
        effect_threshold=effect_threshold,
    )
    similarity = ssim_map(result, truth)
    found = {f"psnr/{name}": psnr(result, truth, region) for name, region in where.items()}
    found |= {f"ssim/{name}": region_average(similarity, region) for name, region in where.items()}
    if lpips_model is not None:
        found |= {
            f"lpips/{name}": lpips(result, truth, lpips_model, region)
            for name, region in where.items()
        }
    return found | {"seam_error": seam_error(result, truth, mask)}
