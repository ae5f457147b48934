"""Draw inpainting examples and keep them encoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from numpy.typing import NDArray
from torch import Tensor

from photographs import (
    Array,
    Rng,
    jitter_colors,
    load_photograph,
    random_crop,
    random_photograph,
)
from scenes import MASK_KINDS, Scene, compose, cover, random_mask, random_scene


def to_tensor(images: list[np.ndarray]) -> Tensor:
    """Stack `(H, W, C)` images in [0, 1] into `(B, C, H, W)`."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


class Source:
    """Draw images of a split from the demo's photographs and, for training, from `more` of them.

    Args:
        more: photographs `(H, W, 3)`, in 0-255; four fifths of the plain crops come from them.
    """

    def __init__(self, split: str, more: Sequence[NDArray[np.uint8]] = ()) -> None:
        self.split, self.more = split, more

    def crop(self, rng: Rng) -> Array:
        """Cut a random square out of a random photograph, `(128, 128, 3)`, in [0, 1]."""
        if self.more and rng.random() < 0.8:
            photograph = self.more[int(rng.integers(len(self.more)))] / np.float32(255)
            chance = 0.3
        else:
            photograph = load_photograph(random_photograph(rng, self.split))
            chance = 0.7
        crop = random_crop(rng, photograph, 128)
        return jitter_colors(rng, crop) if self.split == "train" and rng.random() < chance else crop

    def scene(self, rng: Rng) -> Scene:
        """Compose a scene with an object."""
        if self.more and rng.random() < 0.8:
            background = self.crop(rng)
            return compose(rng, background, background)
        return random_scene(rng, self.split)

    def image(self, rng: Rng) -> Array:
        """Draw a 128 x 128 image: a plain crop, or at times a scene with an object."""
        return self.scene(rng).src if rng.random() < 0.25 else self.crop(rng)


def pack(x: Tensor) -> Tensor:
    """Pack `(B, C, h, w)` into tokens `(B, (h/2)(w/2), 4C)` as Flux does."""
    return FluxFillPipeline._pack_latents(x, *x.shape)


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a pixel mask `(B, 1, H, W)` into the 256 mask channels `(B, (H/16)(W/16), 256)`."""
    return pack(torch.nn.functional.pixel_unshuffle(mask, 8))


def draw_examples(rng: Rng, source: Source) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one scene and make five inpainting examples of it.

    Two masks cover the object: it is gone in the target, *its shadow stays*. One mask lies anywhere
    in the composite, and two anywhere in plain crops: there the target is the image itself.

    Returns:
        Images to mask, targets `(5, 3, 128, 128)` in [-1, 1], and masks `(5, 1, 128, 128)`.
    """
    scene = source.scene(rng)
    crop = source.image(rng)
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
    def add(self, rng: Rng, source: Source) -> None:
        """Draw five examples of a scene and encode them; the oldest give way."""
        seen, wanted, mask = draw_examples(rng, source)
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

    def draw(self, rng: Rng, batch: int) -> tuple[Tensor, Tensor]:
        """Return targets `(B, 64, 64)` and conditions `(B, 64, 64 + 256)`."""
        rows = torch.from_numpy(rng.integers(0, min(self.count, len(self.masks) - 4), batch))
        target, mean, std = self.latents[:, rows].float()
        mask = self.masks[rows].float()
        return target, torch.cat([mean + std * torch.randn_like(std), mask], dim=2)
