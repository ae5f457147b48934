"""Everything the router and the losses want to know about a batch of masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.analysis import contour, topology
from moe_lora.masks.analysis.detail import detail_complexity
from moe_lora.masks.analysis.info import MaskInfo
from moe_lora.masks.analysis.window import bounding_box, window_around
from moe_lora.masks.validation import check_image, check_mask, check_size, mark_checked

_LATENT = 8
_INSIDE = 0.5
_VISIBLE = 0.05


def analyze(
    mask: Tensor, image: Tensor | None = None, *, latent_size: tuple[int, int] | None = None
) -> MaskInfo:
    """Describe a batch of masks by numbers.

    All samples are handled at once and independently, in float32, without autocast. The numbers
    that depend on shape are taken in a square window around each mask, so that they stay the
    same when it moves, turns by 90 degrees or is scaled; detail finer than 1/112 of the mask's
    longer side is averaged out. The window holds all values of at least 0.05 (the whole image if
    there are none). Gradients flow from every float result but `bbox` to `mask` and `image`, and
    are finite; where a score is clamped (the edge complexity of a disk) they are zero.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove. Soft values are used as they
            are, except that `bbox` and `has_occlusion` see `mask >= 0.5`.
        image: `(B, 3, H, W)`, in [0, 1]; without it there is no `detail_complexity`.
        latent_size: `(h, w)` of `mask_latent`; `(H / 8, W / 8)` rounded up by default.

    Returns:
        The `MaskInfo`. The rules of `edge_complexity`, `boundary_smoothness`, `has_occlusion`
        and `detail_complexity` are stated at `moe_lora.masks.analysis.contour.edge_complexity`,
        `contour.boundary_smoothness`, `topology.has_occlusion` and `detail.detail_complexity`.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`; `image` does not fit it, or
            `latent_size` is not two integers >= 1.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
        >>> disk = (x - 60) ** 2 + (y - 70) ** 2 <= 40**2
        >>> square = (x - 60).abs().maximum((y - 70).abs()) <= 40
        >>> ring = disk & ((x - 60) ** 2 + (y - 70) ** 2 > 20**2)
        >>> info = analyze(torch.stack([disk, square, ring])[:, None].float())
        >>> [round(value, 2) for value in info.edge_complexity.tolist()]
        [0.01, 0.11, 0.43]
        >>> info.has_occlusion.tolist()
        [False, False, True]
    """
    # A copy: a later change of the caller's mask must not reach a part of what is known about it.
    mask = mark_checked(check_mask(mask).clone())
    height, width = mask.shape[2:]
    default_size = (-(-height // _LATENT), -(-width // _LATENT))
    size = default_size if latent_size is None else check_size(latent_size, "latent_size")
    image = None if image is None else check_image(image, mask)
    with torch.autocast(mask.device.type, enabled=False):
        values = mask.detach()[:, 0]
        peaks = values.amax(2), values.amax(1)
        bbox = bounding_box(*peaks, _INSIDE)
        visible = bounding_box(*peaks, _VISIBLE)
        whole = visible.new_tensor([0, 0, width, height])
        visible = torch.where(visible.any(1, keepdim=True), visible, whole)
        window = window_around(visible, (height, width), contour.CELLS, contour.MARGIN)
        gradient = contour.contour_gradient(mask, window)
        coarse = window_around(bbox, (height, width), topology.CELLS, topology.MARGIN)
        inside = (mask.detach() >= _INSIDE).float()
        return MaskInfo(
            mask=mask,
            mask_latent=F.adaptive_avg_pool2d(mask, size),
            area_ratio=mask.mean((1, 2, 3)).clamp(0, 1),
            edge_complexity=contour.edge_complexity(mask, gradient, window, visible),
            boundary_smoothness=contour.boundary_smoothness(mask, gradient, window),
            has_occlusion=topology.has_occlusion(inside, coarse),
            bbox=bbox,
            detail_complexity=None if image is None else detail_complexity(mask, image),
        )
