"""Decode latents into images with gradient, whole or in windows."""

from __future__ import annotations

from moe_lora.losses.decoding.latent_decoder import LatentDecoder
from moe_lora.losses.decoding.windows import latent_windows

__all__ = ["LatentDecoder", "latent_windows"]
