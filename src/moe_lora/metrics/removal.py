"""All metrics of a removal."""

from __future__ import annotations

from torch import Tensor, nn

from moe_lora.metrics.image import psnr, region_average, ssim_map
from moe_lora.metrics.metric_values import MetricValues
from moe_lora.metrics.perceptual import lpips
from moe_lora.metrics.regions import EFFECT_THRESHOLD, regions
from moe_lora.metrics.seam import seam_error


def measure(
    prediction: Tensor,
    target: Tensor,
    mask: Tensor,
    source: Tensor | None = None,
    *,
    band_width: int | None = None,
    effect_threshold: float = EFFECT_THRESHOLD,
    lpips_model: nn.Module | None = None,
) -> dict[str, MetricValues]:
    """Compute PSNR and SSIM in every region, and the seam error.

    Args:
        prediction: `(B, 3, H, W)`, image in [0, 1].
        target: `(B, 3, H, W)`, image without the object in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        source: `(B, 3, H, W)`, image with the object in [0, 1]; required for the effect region.
        band_width: width of the boundary region; see `regions`.
        effect_threshold: threshold of the effect region; see `regions`.
        lpips_model: network of `load_lpips`; `None` for no LPIPS.

    Returns:
        `(B,)` by name: `psnr/whole` in dB, `ssim/whole` and, with a network, `lpips/whole`, the
        same for `inside`, `outside`, `boundary` and `effect`, and `seam_error`.

    Raises:
        TypeError, ValueError: if an image is invalid, outside [0, 1] or of another shape, or if
            `mask` is invalid, see `moe_lora.masks.check_mask`.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 1, 16, 16)
        >>> mask[..., 4:12, 4:12] = 1
        >>> target = torch.full((1, 3, 16, 16), 0.5)
        >>> found = measure(target + 0.1 * mask, target, mask)
        >>> round(found["psnr/inside"].mean(), 4), found["psnr/outside"].mean()
        (20.0, 100.0)
        >>> round(found["seam_error"].mean(), 4)
        0.1
    """
    where = regions(
        mask,
        source,
        None if source is None else target,
        band_width=band_width,
        effect_threshold=effect_threshold,
    )
    similarity = ssim_map(prediction, target)
    found = {f"psnr/{name}": psnr(prediction, target, region) for name, region in where.items()}
    found |= {f"ssim/{name}": region_average(similarity, region) for name, region in where.items()}
    if lpips_model is not None:
        found |= {
            f"lpips/{name}": lpips(prediction, target, lpips_model, region)
            for name, region in where.items()
        }
    return found | {"seam_error": seam_error(prediction, target, mask)}
