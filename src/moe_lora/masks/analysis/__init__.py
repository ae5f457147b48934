"""Mask analysis: area, contour, topology, and the detail of the surroundings."""

from __future__ import annotations

from moe_lora.masks.analysis.analyze import analyze
from moe_lora.masks.analysis.info import MaskInfo

__all__ = ["MaskInfo", "analyze"]
