"""Train the tiny Flux Fill that ships with the example, from photographs in installed packages.

    python make_tiny_flux_fill.py --work_dir WORK [--resume]
    python make_tiny_flux_fill.py --work_dir WORK --start MODEL --photographs PACKAGES

Stage `ae` trains an `AutoencoderKL` (2.3 M parameters), stage `base` a `FluxTransformer2DModel`
(3.5 M) on its latents, by flow matching. The base is a generic inpainter for 128 x 128 pixels: it
fills masks and keeps all else, shadows included. Its text inputs are zeros, `(B, 1, 64)` and pooled
`(B, 64)`. The folder is written in fp16, 11.6 MB, anew every ten minutes. There are no text
encoders in it, and stock diffusers wants to be told so:

    FluxFillPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None,
                                     text_encoder_2=None, tokenizer_2=None)

How the bundled model was made, on two CPU cores, and what it reaches on test photographs:

- The first time, from 13 photographs: ae 49 minutes, base 60 minutes. Reconstructions 26.0
  dB; in 10 steps, against the scene without the object but with its shadow: 16.0 dB inside the
  mask, 26.6 dB outside.
- Then from that model, with the 271 photographs of `more_photographs.py` for four fifths of the
  crops (--ae_minutes 26 --base_minutes 48; about 11 400 steps each): reconstructions 27.9 dB
  (coffee 28.5, chelsea 31.6, china 24.1); 16.5 dB inside, 28.4 dB outside. Fewer steps fill more
  smoothly: inside 17.2 dB in 4 steps, 18.3 dB in 1 (before: 16.7 and 17.7).

A linear code of the same size, 16 numbers for 8 x 8 pixels, reaches 26.8 dB on the same images
(principal components of training images), one of 64 numbers for 16 x 16 pixels 27.4 dB.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))

from autoencoder import load_autoencoder, psnr, train_autoencoder
from latent_pool import LatentPool, Source, to_tensor
from more_photographs import read_photographs
from scenes import random_scene
from timed_run import TimedRun

HERE = Path(__file__).parent
TEXT_WIDTH = 64
POOL_SIZE = 40_000


def build_base() -> FluxTransformer2DModel:
    """Return the untrained transformer: the 384 input channels of Flux Fill, 3.5 M parameters."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=384,
        out_channels=64,
        num_layers=1,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def build_pipeline(vae: AutoencoderKL, transformer: FluxTransformer2DModel) -> FluxFillPipeline:
    """Return the stock pipeline, without text encoders."""
    return FluxFillPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def base_loss(base: FluxTransformer2DModel, target: Tensor, condition: Tensor) -> Tensor:
    """Return the flow-matching loss, with masked tokens counted up to six times.

    Half of the noise levels are uniform and half logit-normal, shifted to more noise.
    """
    batch = len(target)
    uniform = torch.rand(batch, 1, 1) < 0.5
    logit_normal = (torch.randn(batch, 1, 1) + 0.5).sigmoid()
    sigma = torch.where(uniform, torch.rand(batch, 1, 1), logit_normal)
    noise = torch.randn_like(target)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = base(
            hidden_states=torch.cat([(1 - sigma) * target + sigma * noise, condition], dim=2),
            timestep=sigma.flatten(),
            encoder_hidden_states=torch.zeros(batch, 1, TEXT_WIDTH),
            pooled_projections=torch.zeros(batch, TEXT_WIDTH),
            txt_ids=torch.zeros(1, 3),
            img_ids=FluxFillPipeline._prepare_latent_image_ids(batch, 8, 8, "cpu", torch.float32),
            return_dict=False,
        )[0].float()
    weight = 1 + 5 * condition[..., 64:].mean(2, keepdim=True)
    return ((velocity - (noise - target)).square() * weight).mean() / weight.mean()


@torch.no_grad()
def fill(
    pipe: FluxFillPipeline, images: Tensor, masks: Tensor, *, steps: int = 10, seed: int = 0
) -> Tensor:
    """Fill the masks of images `(B, 3, 128, 128)` in [0, 1] with the stock pipeline."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=torch.zeros(len(images), 1, TEXT_WIDTH),
        pooled_prompt_embeds=torch.zeros(len(images), TEXT_WIDTH),
        image=images,
        mask_image=masks,
        height=128,
        width=128,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images


def export(work: Path, output: Path, pipe: FluxFillPipeline) -> None:
    """Write the pipeline as fp16 to a folder beside `output`, then put it in its place."""
    scratch = work / "export"
    shutil.rmtree(scratch, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(scratch)
    pipe.to(torch.float32)
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(scratch, output)


def judge(vae: AutoencoderKL, run: TimedRun, work: Path, output: Path) -> str:
    """Export the averaged weights and report what they do on photographs never trained on."""
    base = build_base()
    base.load_state_dict(run.averaged())
    pipe = build_pipeline(vae, base)
    export(work, output, pipe)
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng, "test") for _ in range(24)]
    src, shadowed = to_tensor([s.src for s in scenes]), to_tensor([s.shadowed for s in scenes])
    mask = torch.from_numpy(np.stack([s.mask for s in scenes]))[:, None]
    shadow = torch.from_numpy(np.stack([s.shadow for s in scenes]))[:, None] * (1 - mask)
    filled = fill(pipe, src, mask)
    inside, outside = psnr(filled, shadowed, mask), psnr(filled, shadowed, 1 - mask)
    return (
        f"held-out PSNR to the scene without object, with shadow: inside mask {inside:.2f} dB, "
        f"outside {outside:.2f} dB, in the shadow "
        f"{psnr(filled, shadowed, (shadow > 0.2).float()):.2f} dB"
    )


def train_base(
    work: Path, output: Path, minutes: float, resume: bool, source: Source, start: Path | None
) -> None:
    """Train the transformer on a pool of latents that grows by a scene every few steps."""
    torch.manual_seed(3)
    rng = np.random.default_rng(4)
    vae = load_autoencoder(work, source)
    base = build_base()
    if start is not None:
        weights = FluxTransformer2DModel.from_pretrained(start / "transformer").state_dict()
        base.load_state_dict(weights)
    lr = 1e-3 if start is None else 6e-4
    run = TimedRun(
        base, work / "base.safetensors", lr=lr, minutes=minutes, ema=0.999, weight_decay=0.01
    )
    if resume and run.path.exists():
        run.resume()
        rng = np.random.default_rng(4 + run.steps)
    pool = LatentPool(vae, POOL_SIZE)
    for _ in range(150):
        pool.add(rng, source)
    mean_loss, next_report = 1.0, run.elapsed + 300
    while run.progress < 1:
        if run.steps % 4 == 0 or pool.count < 3000:
            pool.add(rng, source)
        loss = run.step([partial(base_loss, base, *pool.draw(rng, 16)) for _ in range(2)])
        mean_loss += (loss - mean_loss) / 200
        if run.steps % 500 == 0:
            print(
                f"base step {run.steps} minutes {run.elapsed / 60:.1f} loss {mean_loss:.4f} "
                f"pool {pool.count}",
                flush=True,
            )
            run.save()
        if run.elapsed >= next_report:
            next_report = run.elapsed + 600
            print(judge(vae, run, work, output), flush=True)
    run.save()
    print(judge(vae, run, work, output), flush=True)


def main() -> None:
    """Train the stages that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("ae", "base", "all"), default="all")
    parser.add_argument("--ae_minutes", type=float, default=49)
    parser.add_argument("--base_minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work_dir", type=Path, default=Path("tiny_flux_fill_work"))
    parser.add_argument("--output_dir", type=Path, default=HERE / "model")
    parser.add_argument("--photographs", type=Path, help="folder of extracted Debian packages")
    parser.add_argument("--start", type=Path, help="a model folder to start from")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    more = read_photographs(args.photographs) if args.photographs else ()
    source = Source("train", more)
    if args.stage in ("ae", "all"):
        train_autoencoder(args.work_dir, args.ae_minutes, args.resume, source, args.start)
    if args.stage in ("base", "all"):
        train_base(
            args.work_dir, args.output_dir, args.base_minutes, args.resume, source, args.start
        )


if __name__ == "__main__":
    main()
