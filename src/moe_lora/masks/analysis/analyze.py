"""Analysis of a batch of masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.analysis import contour, topology
from moe_lora.masks.analysis.area import area_ratio, bounding_box
from moe_lora.masks.analysis.detail import detail_complexity
from moe_lora.masks.analysis.info import MaskInfo
from moe_lora.masks.analysis.window import window_around
from moe_lora.masks.validation import check_image, check_mask, check_size, mark_checked

_LATENT = 8
_INSIDE = 0.5
_VISIBLE = 0.05


def analyze(
    mask: Tensor, image: Tensor | None = None, *, latent_size: tuple[int, int] | None = None
) -> MaskInfo:
    """Compute the area, contour, topology and surroundings of each mask.

    Samples are batched but independent, computed in float32 without autocast. Shape properties are
    computed in a square window around each mask, so that they are invariant to translation,
    rotation by 90 degrees and scale; detail finer than 1/112 of the mask's longer side is averaged
    out. The window contains all values of at least 0.05, or the whole image if there is none.
    All float fields have finite gradients to `mask` and `image`; the gradient of a clamped value,
    such as the edge complexity of a disk, is zero.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove. `bbox` and `has_occlusion`
            threshold soft values at 0.5.
        image: `(B, 3, H, W)`, in [0, 1]; required for `detail_complexity`.
        latent_size: `(h, w)` of `mask_latent`; `(H / 8, W / 8)`, rounded up, by default.

    Returns:
        The `MaskInfo`, which defines every property.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `check_mask`, `image` has another
            size, or `latent_size` is not two integers >= 1.

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
    # A copy: in-place changes of the caller's mask must not make the fields inconsistent.
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
            area_ratio=area_ratio(mask),
            edge_complexity=contour.edge_complexity(mask, gradient, window, visible),
            boundary_smoothness=contour.boundary_smoothness(mask, gradient, window),
            has_occlusion=topology.has_occlusion(inside, coarse),
            bbox=bbox,
            detail_complexity=None if image is None else detail_complexity(mask, image),
        )
