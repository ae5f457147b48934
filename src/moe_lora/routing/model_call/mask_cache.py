"""Cache for the analysis of a mask, which is the same in all steps of a denoising loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from moe_lora.masks import MaskInfo, analyze


def analyze_detached(mask: Tensor, image: Tensor | None = None) -> MaskInfo:
    """Analyze a mask without a graph, for use inside and outside of inference mode.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        image: `(B, 3, H, W)`, in [0, 1]; `None` leaves the detail complexity unknown.
    """
    with torch.inference_mode(False), torch.no_grad():
        return analyze(mask, image)


class MaskCache:
    """Cache with the analysis of the last mask.

    Example:
        >>> cache, mask = MaskCache(), torch.ones(1, 1, 8, 8)
        >>> cache.analyze(mask) is cache.analyze(mask.clone())
        True
    """

    def __init__(self) -> None:
        # One attribute, so that no thread reads a mask with the analysis of another mask.
        self._cached: tuple[Tensor, MaskInfo] | None = None

    def analyze(self, mask: Tensor) -> MaskInfo:
        """Return `masks.analyze(mask)`; a mask with a graph is analyzed at each call, with graph.

        Args:
            mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        """
        if _needs_fresh_analysis(mask):
            return analyze(mask)
        cached = self._cached
        if cached is None or not _equal_masks(cached[0], mask):
            with torch.inference_mode(False), torch.no_grad():
                copied = mask.clone()
            cached = self._cached = (copied, analyze_detached(copied))
        return cached[1]

    def __getstate__(self) -> dict[str, None]:
        return {"_cached": None}


def _equal_masks(cached: Tensor, mask: Tensor) -> bool:
    comparable = (
        cached.shape == mask.shape and cached.dtype == mask.dtype and cached.device == mask.device
    )
    return comparable and cached.equal(mask)


def _needs_fresh_analysis(mask: Tensor) -> bool:
    """Return whether the mask has a graph, or is traced or transformed."""
    has_graph = mask.requires_grad and torch.is_grad_enabled()
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return has_graph or transformed or type(mask) is not Tensor
