"""The steps of a denoising loop show the router the same mask again and again."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.masks import MaskInfo, analyze


class MaskMemory:
    """Analyse a mask once while it stays the same.

    Example:
        >>> import torch
        >>> memory, mask = MaskMemory(), torch.ones(1, 1, 8, 8)
        >>> memory.analyze(mask) is memory.analyze(mask.clone())
        True
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._info: MaskInfo | None = None

    def analyze(self, mask: Tensor) -> MaskInfo:
        """Return `masks.analyze(mask)`.

        Args:
            mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        """
        if self._info is None or not self._knows(mask):
            self._mask, self._info = mask.detach().clone(), analyze(mask)
        return self._info

    def _knows(self, mask: Tensor) -> bool:
        known = self._mask
        if known is None or known.shape != mask.shape or known.dtype != mask.dtype:
            return False
        # What was computed in inference mode cannot be used in training.
        unusable = known.is_inference() and not torch.is_inference_mode_enabled()
        return known.device == mask.device and not unusable and known.equal(mask)

    def __getstate__(self) -> dict[str, None]:
        return {"_mask": None, "_info": None}
