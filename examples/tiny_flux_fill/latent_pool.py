"""Draw inpainting examples and keep them encoded."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from torch import Tensor

from photographs import jitter_colors, load_photograph, random_crop, random_photograph
from scenes import MASK_KINDS, cover, random_mask, random_scene


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Stack `(H, W, C)` images in [0, 1] into `(B, C, H, W)`."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def draw_image(rng: np.random.Generator, split: str) -> np.ndarray:
    """Draw a 128 x 128 image: a plain crop, or at times a scene with an object."""
    if rng.random() < 0.25:
        return random_scene(rng, split).src
    crop = random_crop(rng, load_photograph(random_photograph(rng, split)), 128)
    return jitter_colors(rng, crop) if split == "train" and rng.random() < 0.7 else crop


def pack(x: Tensor) -> Tensor:
    """Pack `(B, C, h, w)` into tokens `(B, (h/2)(w/2), 4C)` as Flux does."""
    return FluxFillPipeline._pack_latents(x, *x.shape)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a pixel mask `(B, 1, H, W)` into the 256 mask channels `(B, (H/16)(W/16), 256)`."""
    return pack(torch.nn.functional.pixel_unshuffle(mask, 8))


def draw_examples(rng: np.random.Generator, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one scene and make five inpainting examples of it.

    Two masks cover the object: it is gone in the target, *its shadow stays*. One mask lies anywhere
    in the composite, and two anywhere in plain crops: there the target is the image itself.

    Returns:
        Images to mask, targets `(5, 3, 128, 128)` in [-1, 1], and masks `(5, 1, 128, 128)`.
    """
    scene = random_scene(rng, split)
    crop = draw_image(rng, split)
    kinds = rng.choice(MASK_KINDS, 4)
    free = [random_mask(rng, 128, str(kind)) for kind in kinds[:3]]
    masks = [scene.mask, cover(rng, scene.alpha, str(kinds[3])), *free]
    seen = to_tensor([scene.src, scene.src, scene.src, scene.result, crop])
    wanted = to_tensor([scene.shadowed, scene.shadowed, scene.src, scene.result, crop])
    return seen * 2 - 1, wanted * 2 - 1, torch.from_numpy(np.stack(masks))[:, None]


class LatentPool:
    """Hold encoded examples: packed targets, packed masked images (mean, std), packed masks."""

    def __init__(self, vae: AutoencoderKL, size: int) -> None:
        self.vae, self.count = vae, 0
        self.latents = torch.empty(3, size, 64, 64, dtype=torch.float16)
        self.masks = torch.empty(size, 64, 256, dtype=torch.uint8)

    @torch.no_grad()
    def add(self, rng: np.random.Generator, split: str) -> None:
        """Draw five examples of a scene and encode them; the oldest give way."""
        seen, wanted, mask = draw_examples(rng, split)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = self.vae.encode(torch.cat([wanted, seen * (1 - mask)])).latent_dist
        shift, scale = self.vae.config.shift_factor, self.vae.config.scaling_factor
        mean, std = (posterior.mean.float() - shift) * scale, posterior.std.float() * scale
        start = self.count % (len(self.masks) - len(mask) + 1)
        rows = slice(start, start + len(mask))
        self.latents[0, rows] = pack(mean[: len(mask)]).half()
        self.latents[1, rows] = pack(mean[len(mask) :]).half()
        self.latents[2, rows] = pack(std[len(mask) :]).half()
        self.masks[rows] = pack_mask(mask).to(torch.uint8)
        self.count += len(mask)

    def draw(self, rng: np.random.Generator, batch: int) -> tuple[Tensor, Tensor]:
        """Return targets `(B, 64, 64)` and conditions `(B, 64, 64 + 256)`."""
        rows = torch.from_numpy(rng.integers(0, min(self.count, len(self.masks) - 4), batch))
        target, mean, std = self.latents[:, rows].float()
        mask = self.masks[rows].float()
        return target, torch.cat([mean + std * torch.randn_like(std), mask], dim=2)
