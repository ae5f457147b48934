"""Train the autoencoder of the tiny Flux Fill."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latent_pool import Source, to_tensor
from timed_run import TimedRun

POOL_SIZE = 1500


def build_autoencoder() -> AutoencoderKL:
    """Return the untrained autoencoder: 8 times smaller, 16 channels, 2.3 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        layers_per_block=1,
        block_out_channels=(32, 64, 96, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
    )


def autoencoder_loss(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Compare a reconstruction with `x` `(B, 3, H, W)`: PSNR of each image, L1, and KL."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
    error = y.float() - x
    squares = (error.square().mean((1, 2, 3)) / 4 + 1e-5).log().mean()
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
    return 0.1 * squares + error.abs().mean() + 1e-5 * kl


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Return the mean PSNR in dB of images `(B, 3, H, W)` in [0, 1], where `where` is 1."""
    weight = torch.ones_like(a) if where is None else where.expand_as(a)
    error = ((a - b).square() * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


@torch.no_grad()
def autoencoder_psnr(vae: AutoencoderKL, weights: dict[str, Tensor], images: Tensor) -> float:
    """Return the PSNR of reconstructions under `weights`."""
    judge = build_autoencoder()
    judge.load_state_dict(weights)
    latents = judge.encode(images * 2 - 1).latent_dist.mode()
    return psnr((judge.decode(latents).sample / 2 + 0.5).clamp(0, 1), images)


def train_autoencoder(
    work: Path, minutes: float, resume: bool, source: Source, start: Path | None
) -> None:
    """Train the autoencoder on 64 x 64 pieces of a slowly renewed pool of training images."""
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    vae = build_autoencoder()
    if start is not None:
        vae.load_state_dict(AutoencoderKL.from_pretrained(start / "vae").state_dict())
    lr = 1e-3 if start is None else 6e-4
    run = TimedRun(vae, work / "ae.safetensors", lr=lr, minutes=minutes, ema=0.999)
    if resume and run.path.exists():
        run.resume()
        rng = np.random.default_rng(1 + run.steps)
    held_out = to_tensor([Source("test").image(np.random.default_rng(i)) for i in range(32)])
    pool = to_tensor([source.image(rng) for _ in range(POOL_SIZE)]).mul_(255).to(torch.uint8)
    mean_loss = 0.0
    while run.progress < 1:
        if run.steps % 4 == 0:
            fresh = to_tensor([source.image(rng)])[0].mul_(255).to(torch.uint8)
            pool[int(rng.integers(len(pool)))] = fresh
        whole = run.steps % 5 == 4
        side, batch = (128, 2) if whole else (64, 8)
        picks = rng.integers(0, len(pool), batch)
        tops, lefts = rng.integers(0, 128 - side + 1, (2, batch))
        x = torch.stack(
            [
                pool[i, :, t : t + side, f : f + side]
                for i, t, f in zip(picks, tops, lefts, strict=True)
            ]
        )
        x = x.float() / 127.5 - 1
        if rng.random() < 0.5:
            x = x.transpose(2, 3).contiguous()
        loss = run.step([partial(autoencoder_loss, vae, part) for part in x.chunk(2)])
        mean_loss += (loss - mean_loss) / 100
        if run.steps % 250 == 0:
            quality = autoencoder_psnr(vae, run.averaged(), held_out)
            print(
                f"ae step {run.steps} minutes {run.elapsed / 60:.1f} loss {mean_loss:.4f} "
                f"held-out PSNR {quality:.2f} dB",
                flush=True,
            )
            run.save()
    run.save()


def load_autoencoder(work: Path, source: Source) -> AutoencoderKL:
    """Load the trained autoencoder and measure its `scaling_factor` and `shift_factor`."""
    vae = build_autoencoder()
    run = TimedRun(vae, work / "ae.safetensors", lr=0.0, minutes=1.0, ema=0.0)
    run.resume()
    vae.load_state_dict(run.averaged())
    vae.requires_grad_(False)
    rng = np.random.default_rng(2)
    images = to_tensor([source.image(rng) for _ in range(96)])
    with torch.no_grad():
        latents = torch.cat([vae.encode(x * 2 - 1).latent_dist.mode() for x in images.split(16)])
    vae.register_to_config(
        scaling_factor=round(1 / latents.std().item(), 4),
        shift_factor=round(latents.mean().item(), 4),
    )
    return vae
