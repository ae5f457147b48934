"""What decoding with gradient costs the pixel losses: the last table of `masks_and_losses.py`."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from flux_variants import creating
from measuring import DTYPES, interleaved, peak_bytes, saved_bytes, tensors_of
from torch import Tensor, nn

from moe_lora.losses import (
    LatentDecoder,
    boundary_loss,
    consistency_loss,
    detail_loss,
    latent_windows,
)
from moe_lora.losses.decoding.windows import Window

WHOLE = "whole"
TRAINED_VAE = Path(__file__).parents[1] / "examples" / "tiny_flux_fill" / "model" / "vae"


def build_vae(width: int, device: str, dtype: torch.dtype) -> AutoencoderKL:
    """Build the autoencoder of Flux at another width; 128 is the real one."""
    with creating(device, dtype):
        return AutoencoderKL(
            latent_channels=16,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=min(32, width),
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )


class PixelStep:
    """Go from latents to the pixel losses and back.

    Args:
        vae: the autoencoder.
        latents: `(B, C, h, w)`.
        image: `(B, 3, 8h, 8w)`.
        mask: `(B, 1, 8h, 8w)`.
        margin: of the window; `None` to decode all with gradient.
        checkpoint: as of `LatentDecoder`.
    """

    def __init__(
        self,
        vae: nn.Module,
        latents: Tensor,
        image: Tensor,
        mask: Tensor,
        *,
        margin: int | None = None,
        checkpoint: bool = False,
    ) -> None:
        self.decoder = LatentDecoder(vae, dtype=None, checkpoint=checkpoint)
        self.latents, self.image, self.mask, self.margin = latents, image, mask, margin
        self.beside = [*tensors_of(vae), latents, image, mask]

    def windows(self) -> list[Window]:
        margin = 0 if self.margin is None else self.margin
        height, width = self.latents.shape[2:]
        return latent_windows(self.mask, (height, width), margin)

    def picture(self, latents: Tensor) -> Tensor:
        if self.margin is None:
            return self.decoder(latents)
        return self.decoder.in_windows(latents, self.windows())

    def loss(self, picture: Tensor) -> Tensor:
        terms = (boundary_loss, consistency_loss, detail_loss)
        weights = (0.3, 0.5, 0.2)
        pairs = zip(weights, terms, strict=True)
        found = [weight * term(picture, self.image, self.mask) for weight, term in pairs]
        return torch.stack(found).sum()

    def forward(self) -> Tensor:
        return self.loss(self.picture(self.latents.clone().requires_grad_()))

    def __call__(self) -> None:
        self.forward().backward()

    def saved(self) -> int:
        return saved_bytes(self.forward, self.beside)

    def gradient(self, windows: list[Window] | None = None) -> tuple[Tensor, Tensor]:
        """Return picture and gradient, where only pixels of the windows count."""
        latents = self.latents.clone().requires_grad_()
        picture = self.picture(latents)
        if windows is not None:
            counted = torch.zeros_like(picture)
            for index, window in enumerate(windows):
                window.times(picture.shape[2] // latents.shape[2]).of(counted[index]).fill_(1)
            picture = torch.where(counted > 0, picture, picture.detach())
        self.loss(picture).backward()
        assert latents.grad is not None
        return picture.detach(), latents.grad


def pixel_steps(args: argparse.Namespace) -> dict[str, PixelStep]:
    dtype, side = DTYPES[args.dtype], args.pixel_side
    vae = build_vae(args.vae_width, args.device, dtype)
    mask = torch.zeros(1, 1, side, side, device=args.device)
    mask[..., side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
    latents = torch.randn(1, 16, side // 8, side // 8, device=args.device, dtype=dtype)
    image = torch.rand(1, 3, side, side, device=args.device)
    build = partial(PixelStep, vae, latents, image, mask)
    steps = {WHOLE: build(), f"{WHOLE}, checkpointed": build(checkpoint=True)}
    for margin in args.margins:
        name = f"window, margin {margin}"
        steps[name] = build(margin=margin)
        steps[f"{name}, checkpointed"] = build(margin=margin, checkpoint=True)
    return steps


def smooth_picture(side: int, device: str) -> Tensor:
    coarse = torch.rand(1, 3, 12, 12, device=device)
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)


def nearness(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Compare gradients of windows with those of the whole on the bundled autoencoder."""
    vae = AutoencoderKL.from_pretrained(TRAINED_VAE).to(args.device)
    side = min(args.pixel_side, 256)
    image = smooth_picture(side, args.device)
    config = vae.config
    with torch.no_grad():
        mean = vae.encode(2 * image - 1).latent_dist.mean
    latents = (mean - config.shift_factor) * config.scaling_factor
    latents = latents + 0.2 * torch.randn_like(latents)
    mask = torch.zeros(1, 1, side, side, device=args.device)
    mask[..., side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = 1
    whole, found = PixelStep(vae, latents, image, mask), {}
    for margin in args.margins:
        part = PixelStep(vae, latents, image, mask, margin=margin)
        (window,) = part.windows()
        expected, here = (
            step.gradient(windows) for step, windows in ((whole, [window]), (part, None))
        )
        reference, own = (window.of(gradient).flatten() for _, gradient in (expected, here))
        found[margin] = {
            "off by": (expected[0] - here[0]).abs().max().item(),
            "cosine": F.cosine_similarity(reference, own, dim=0).item(),
        }
    return found


def pixel_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    steps, near = pixel_steps(args), nearness(args)
    times = interleaved(steps, args.pixel_rounds, warmup=1, device=args.device)
    peaks = {name: peak_bytes(step, args.device) for name, step in steps.items()}
    return [
        {
            "decoding": name,
            "seconds": times.seconds(name),
            "peak": peaks[name],
            "/ whole": peaks[name] / peaks[WHOLE],
            "saved": step.saved(),
            **({} if step.margin is None else near[step.margin]),
        }
        for name, step in steps.items()
    ]
