"""Mask analysis of training batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_lora.masks.analysis.analyze import analyze

_IMAGE_KEYS = ("src", "result")


def extract_mask_info_from_batch(
    batch: Mapping[str, Any], *, latent_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Analyze the masks of a training batch.

    Args:
        batch: mapping with `mask`, `(B, 1, H, W)` in [0, 1], 1 = remove, and optionally the
            images `src` and `result`, `(B, 3, H, W)` in [0, 1]. Other keys are ignored.
        latent_size: `(h, w)` of `mask_latent`; an eighth of the mask's size by default.

    Returns:
        `mask_latent`, `area_ratio`, `edge_complexity`, `boundary_smoothness`, `mask`,
        `has_occlusion` and `bbox`, see `MaskInfo`; with an image also `detail_complexity`,
        computed on `src` or, without it, on `result`.

    Raises:
        TypeError: if `batch` is not a mapping, or an entry has the wrong type.
        ValueError: if `mask` is missing, or an entry has the wrong shape or values.

    Example:
        >>> import torch
        >>> info = extract_mask_info_from_batch({"mask": torch.ones(2, 1, 64, 128)})
        >>> info["mask_latent"].shape, info["area_ratio"].tolist()
        (torch.Size([2, 1, 8, 16]), [1.0, 1.0])
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"Expected `batch` to be a mapping, but got {type(batch).__name__}.")
    if batch.get("mask") is None:
        raise ValueError(
            "Expected `batch` to have the key `mask` (B, 1, H, W) beside `ref`, `src` and "
            f"`result` (B, 3, H, W), but got the keys {sorted(map(str, batch))}."
        )
    images = [batch[key] for key in _IMAGE_KEYS if batch.get(key) is not None]
    info = analyze(batch["mask"], images[0] if images else None, latent_size=latent_size)
    extracted = {
        "mask_latent": info.mask_latent,
        "area_ratio": info.area_ratio,
        "edge_complexity": info.edge_complexity,
        "boundary_smoothness": info.boundary_smoothness,
        "mask": info.mask,
        "has_occlusion": info.has_occlusion,
        "bbox": info.bbox,
    }
    if info.detail_complexity is not None:
        extracted["detail_complexity"] = info.detail_complexity
    return extracted
