"""Measure a pipeline on held-out triplets, region by region."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import FluxFillPipeline
from torch import Tensor

from batches import BucketBatches, picture_sizes
from dataset import RemovalDataset
from models import Conditioner, guidance_for
from moe_lora import current_routing, masks
from moe_lora.losses import default_band_width

REGIONS = ("whole", "inside", "outside", "boundary", "shadow")

SHADOW_CONTRAST = 0.05
"""Outside the mask, a mean difference above this between source and truth is the shadow."""

SMALLEST_REGION = 16
"""Fewer pixels than this are not measured."""


@dataclass
class Results:
    """Hold what a pipeline made of a data set, in the order of its samples.

    Attributes:
        images: `(3, H, W)` each, in [0, 1].
        weights: `(E,)` each, routing weights averaged over the denoising steps; empty without
            a router.
    """

    images: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def run_pipeline(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    dataset: RemovalDataset,
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 8,
    guidance_scale: float | None = None,
) -> Results:
    """Run the stock pipeline on every sample; a sample's noise depends on its index and the seed.

    Args:
        pipe: with or without a checkpoint in its transformer.
        conditioner: makes the prompt embeddings.
        dataset: the triplets; `result` is not read.
        steps: of denoising.
        seed: of the noise.
        batch_size: of pictures of one size.
        guidance_scale: for models with guidance embeddings.
    """
    images: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    guidance = guidance_for(pipe.transformer, guidance_scale, 1)
    pipe.set_progress_bar_config(disable=True)
    for indices in BucketBatches(picture_sizes(dataset), batch_size, seed=0).epoch(0):
        items = [dataset[index] for index in indices]
        src, mask, ref = (torch.stack([item[k] for item in items]) for k in ("src", "mask", "ref"))
        prompt_embeds, pooled_embeds = conditioner(ref)
        seen: list[Tensor] = []

        def note(
            pipe: FluxFillPipeline,
            step: int,
            timestep: Tensor,
            values: dict[str, Any],
            seen: list[Tensor] = seen,
        ) -> dict[str, Any]:
            decision = current_routing(pipe.transformer) if has_experts(pipe) else None
            if decision is not None:
                seen.append(decision.weights)
            return {}

        filled = pipe(
            image=src,
            mask_image=mask,
            height=src.shape[-2],
            width=src.shape[-1],
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_embeds,
            guidance_scale=0.0 if guidance is None else guidance.item(),
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + i) for i in indices],
            output_type="pt",
            callback_on_step_end=note,
        ).images
        images |= dict(zip(indices, filled.float().cpu(), strict=True))
        if seen:
            mean = torch.stack(seen).mean(0).cpu()
            weights |= dict(zip(indices, mean, strict=True))
    return Results([images[i] for i in sorted(images)], [weights[i] for i in sorted(weights)])


def has_experts(pipe: FluxFillPipeline) -> bool:
    """Tell whether a checkpoint is loaded into the pipeline's transformer."""
    return bool(getattr(pipe.transformer, "peft_config", None))


def regions(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return where to measure a sample: boolean maps `(H, W)` by the names of `REGIONS`."""
    mask = (item["mask"] >= 0.5).float()[None]
    inside = mask[0, 0] > 0
    height, width = inside.shape
    band = masks.boundary_band(mask, default_band_width(height, width))[0, 0] > 0
    changed = (item["src"] - item["result"]).abs().mean(0) > SHADOW_CONTRAST
    return {
        "whole": torch.ones_like(inside),
        "inside": inside,
        "outside": ~inside,
        "boundary": band,
        "shadow": changed & ~inside,
    }


def psnr(image: Tensor, truth: Tensor, where: Tensor) -> float:
    """Return the PSNR in dB of images `(3, H, W)` in [0, 1] over the pixels of a boolean map.

    >>> psnr(torch.full((3, 2, 2), 0.1), torch.zeros(3, 2, 2), torch.ones(2, 2, dtype=torch.bool))
    20.0
    """
    error = (image - truth)[:, where].double().square().mean()
    return round(float(-10 * error.clamp_min(1e-10).log10()), 6)


def measure(images: list[Tensor], dataset: RemovalDataset) -> dict[str, float]:
    """Return the mean PSNR in dB against the truth, for every region.

    The mean runs over the samples in which the region has at least `SMALLEST_REGION` pixels.
    """
    found: dict[str, list[float]] = {name: [] for name in REGIONS}
    for index, image in enumerate(images):
        item = dataset[index]
        for name, where in regions(item).items():
            if int(where.sum()) >= SMALLEST_REGION:
                found[name].append(psnr(image, item["result"], where))
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Return measurements as a table: regions down, columns across, then the gain of the last.

    >>> print(table({"base": {"whole": 20.0}, "ours": {"whole": 23.5}}))
    PSNR, dB      base    ours    gain
    whole        20.00   23.50   +3.50
    """
    names = list(columns)
    lines = ["PSNR, dB  " + "".join(f"{name:>8}" for name in [*names, "gain"])]
    for region in columns[names[0]]:
        values = [columns[name][region] for name in names]
        row = "".join(f"{value:8.2f}" for value in values)
        lines.append(f"{region:<10}{row}{values[-1] - values[0]:+8.2f}")
    return "\n".join(lines)
