"""Train adapters and routers on the scenes of `removal_kinds.py`, and measure them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from kinds_scenes import Scenes
from torch import Tensor, nn

import moe_lora
from moe_lora import RouterInputs, flow, masks, metrics
from moe_lora.ablation import Specialization, specialization
from moe_lora.routing import SurroundingsRouter, router_supervision_loss

BATCH = 8
WARMUP = 20
TOKENS = 8
TEXT_WIDTH = 64
SMALLEST_REGION = 16
REGIONS = ("whole", "inside", "outside", "effect")

Prompt = tuple[Tensor, Tensor]
Means = dict[str, dict[str, float]]


def prompts(kinds: Tensor, told: bool) -> Prompt:
    """Return prompt embeddings `(B, 1, 64)` and pooled ones `(B, 64)` for the kinds of samples.

    Args:
        kinds: `(B,)`, indices of kinds.
        told: a random vector for each kind; otherwise zeros, the bundled model's own prompt.
    """
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(16, 2, TEXT_WIDTH, generator=generator) * told
    text, pooled = table[kinds].unbind(1)
    return text.unsqueeze(1), pooled


def call(model: nn.Module, x_t: Tensor, condition: Tensor, sigma: Tensor, prompt: Prompt) -> Tensor:
    """Return the velocity that the transformer predicts, `(B, T, 64)`."""
    text, pooled = prompt
    ids = FluxFillPipeline._prepare_latent_image_ids(1, TOKENS, TOKENS, "cpu", torch.float32)
    velocity: Tensor = model(
        hidden_states=torch.cat([x_t, condition], dim=-1),
        timestep=sigma,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        txt_ids=torch.zeros(text.shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    return velocity


def hinted(model: nn.Module, kinds: Tensor, names: Sequence[str]) -> AbstractContextManager[None]:
    """Return a context in which task hints name the expert of each sample's kind.

    Args:
        model: the adapted transformer.
        kinds: `(B,)`, indices of kinds.
        names: experts by kind; without them there are no hints.
    """
    if not names:
        return nullcontext()
    hints = [f"{names[index]}_only" for index in kinds.tolist()]
    return moe_lora.router_inputs(model, task_hint=hints)


def fit(
    model: nn.Module,
    scenes: Scenes,
    *,
    steps: int,
    seed: int,
    learning_rate: float,
    names: Sequence[str] = (),
    told: bool = False,
    supervision: float = 0.0,
) -> None:
    """Train the trainable parameters by flow matching, with a cosine schedule.

    Args:
        model: the adapted transformer.
        scenes: to train on.
        steps: of training, with 8 scenes each.
        seed: of the scenes' order, the noise levels and the noise.
        learning_rate: the highest.
        names: experts by kind, to be hinted; without them there are no hints.
        told: whether the prompt tells the kind.
        supervision: weight of the loss that teaches the router the kinds.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / WARMUP) * cosine
        while len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(scenes), generator=generator)])
        rows, order = order[:BATCH], order[BATCH:]
        x0, kinds = scenes.target[rows], scenes.kind[rows]
        sigma = torch.rand(len(rows), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        x_t = flow.interpolate(x0, noise, sigma)
        with hinted(model, kinds, names):
            found = call(model, x_t, scenes.condition[rows], sigma, prompts(kinds, told))
        loss = (found - flow.velocity(x0, noise)).square().mean()
        if supervision:
            decision = moe_lora.current_routing(model)
            assert decision is not None
            loss = loss + supervision * router_supervision_loss(decision.logits, kinds)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def router_inputs(scenes: Scenes) -> RouterInputs:
    """Return what a router sees of scenes; the noisy latents are zeros."""
    latents = scenes.condition[..., :64]
    return RouterInputs(
        torch.cat([torch.zeros_like(latents), latents], dim=-1),
        mask_info=masks.analyze(scenes.mask.float()),
        grid_size=(TOKENS, TOKENS),
    )


def fit_router(router: SurroundingsRouter, scenes: Scenes, *, steps: int, seed: int) -> None:
    """Train a router by the kinds of scenes, without the transformer.

    Args:
        router: of a model, whose experts are in the order of the kinds.
        scenes: with labels.
        steps: of training, with 64 scenes each.
        seed: of the scenes' order, the augmentation and dropout.
    """
    optimizer = torch.optim.AdamW(router.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    frames = router.frames(router_inputs(scenes))
    router.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(len(scenes), (min(64, len(scenes)),))
            logits = router.frame_logits(frames[rows])
            loss = router_supervision_loss(logits, scenes.kind[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    router.eval()


@torch.no_grad()
def accuracy(router: SurroundingsRouter, scenes: Scenes) -> float:
    """Return the share of the scenes whose largest logit is that of their kind."""
    found = router(router_inputs(scenes)).logits.argmax(-1)
    return float((found == scenes.kind).float().mean())


@torch.no_grad()
def weights_by_kind(
    router: SurroundingsRouter, scenes: Scenes, kinds: Sequence[str]
) -> dict[str, list[float]]:
    """Return the mean routing weights of the experts by kind."""
    weights = router(router_inputs(scenes)).weights
    means = {kind: weights[scenes.kind == index].mean(0) for index, kind in enumerate(kinds)}
    return {kind: [round(weight, 4) for weight in mean.tolist()] for kind, mean in means.items()}


class Judge:
    """Denoise scenes with an adapted transformer as the stock pipeline does, and measure them.

    Args:
        folder: the base model's.
        steps: of denoising.
    """

    def __init__(self, folder: Path, *, steps: int = 4) -> None:
        absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        self.pipe = FluxFillPipeline.from_pretrained(folder, **absent)
        self.pipe.set_progress_bar_config(disable=True)
        self.folder, self.steps = folder, steps

    def transformer(self) -> FluxTransformer2DModel:
        """Return a new transformer of the base model, frozen."""
        loaded = FluxTransformer2DModel.from_pretrained(self.folder, subfolder="transformer")
        frozen: FluxTransformer2DModel = loaded.requires_grad_(False)
        return frozen

    @torch.no_grad()
    def images(
        self, model: nn.Module, scenes: Scenes, *, names: Sequence[str] = (), told: bool = False
    ) -> Tensor:
        """Return the predictions, `(N, 3, H, W)`, in [0, 1].

        Args:
            model: the adapted transformer.
            scenes: to edit.
            names: experts by kind, to be hinted.
            told: whether the prompt tells the kind.
        """
        vae = self.pipe.vae
        sigmas = [1 - step / self.steps for step in range(self.steps + 1)]
        found = []
        for rows in torch.arange(len(scenes)).split(24):
            prompt = prompts(scenes.kind[rows], told)
            noise = [
                torch.randn(
                    1, 16, 2 * TOKENS, 2 * TOKENS, generator=torch.Generator().manual_seed(i)
                )
                for i in rows.tolist()
            ]
            planes = torch.cat(noise)
            x_t = FluxFillPipeline._pack_latents(planes, *planes.shape)
            with hinted(model, scenes.kind[rows], names):
                for sigma, after in pairwise(sigmas):
                    level = torch.full((len(rows),), sigma)
                    velocity = call(model, x_t, scenes.condition[rows], level, prompt)
                    x_t = x_t + (after - sigma) * velocity
            latents = FluxFillPipeline._unpack_latents(x_t, 16 * TOKENS, 16 * TOKENS, 8)
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
            found.append((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
        return torch.cat(found)

    def specialization(
        self, model: nn.Module, scenes: Scenes, kinds: Sequence[str]
    ) -> Specialization:
        """Leave out one expert at a time, and see what each kind loses in the effect region."""

        def evaluate(model: nn.Module, scenes: Scenes) -> dict[str, Tensor]:
            found = psnr_by_kind(self.images(model, scenes), scenes, kinds)
            effect = {kind: regions["effect"] for kind, regions in found.items()}
            return {
                kind: torch.tensor([math.nan if value is None else value for value in values])
                for kind, values in effect.items()
            }

        pairs = {kind: kind for kind in kinds}
        return specialization(model, [scenes], evaluate, higher_is_better=kinds, pairs=pairs)

    def measure(
        self,
        model: nn.Module,
        scenes: Scenes,
        kinds: Sequence[str],
        *,
        names: Sequence[str] = (),
        told: bool = False,
    ) -> Means:
        """Return the mean PSNR in dB by kind and region, and over the kinds as `mean`."""
        images = self.images(model, scenes, names=names, told=told)
        return measure(images, scenes, kinds)


def psnr_by_kind(
    images: Tensor, scenes: Scenes, kinds: Sequence[str]
) -> dict[str, dict[str, list[float | None]]]:
    """Return the PSNR in dB of each prediction by kind and region; None for too small a region.

    For a kind without effects outside the mask, such as stains, which stay, the effect region is
    the whole region outside.
    """
    found = metrics.measure(images, scenes.result / 255, scenes.mask.float(), scenes.source / 255)
    values = {region: found[f"psnr/{region}"].tolist(SMALLEST_REGION) for region in REGIONS}
    indices = {kind: (scenes.kind == i).nonzero()[:, 0].tolist() for i, kind in enumerate(kinds)}
    by_kind = {
        kind: {region: [values[region][i] for i in indices[kind]] for region in REGIONS}
        for kind in kinds
    }
    for regions in by_kind.values():
        if all(value is None for value in regions["effect"]):
            regions["effect"] = regions["outside"]
    return by_kind


def measure(images: Tensor, scenes: Scenes, kinds: Sequence[str]) -> Means:
    """Return the mean PSNR in dB of predictions by kind and region, and over kinds as `mean`."""
    means: Means = {
        kind: {
            region: round(statistics.fmean(v for v in values if v is not None), 3)
            for region, values in regions.items()
        }
        for kind, regions in psnr_by_kind(images, scenes, kinds).items()
    }
    means["mean"] = {
        region: round(statistics.fmean(means[kind][region] for kind in kinds), 3)
        for region in REGIONS
    }
    return means
