"""Measure a pipeline on held-out triplets, region by region."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from torch import Tensor

from flux_fill.kind_hints import KindHints
from flux_fill.models import Conditioner, guidance_for
from flux_fill.surroundings import apply_surroundings
from moe_lora import MoELoraConfig, current_routing, metrics
from moe_lora.metrics import MetricValues
from removal_data.batches import BucketBatches, image_sizes
from removal_data.dataset import RemovalDataset

REGIONS = {
    "whole": "whole",
    "inside": "inside",
    "outside": "outside",
    "boundary": "boundary",
    "shadow": "effect",
}
"""The regions of `moe_lora.metrics.regions` by the names that this example gives them."""

SMALLEST_REGION = 16
"""Fewer pixels than this are not measured."""


@dataclass
class Results:
    """Hold what a pipeline made of a data set, in the order of its samples.

    Attributes:
        images: `(3, H, W)` each, in [0, 1].
        weights: `(E,)` each, routing weights averaged over the denoising steps and, where every
            token has its own, over the tokens; empty without a router.
    """

    images: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


def run_pipeline(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    dataset: RemovalDataset,
    *,
    steps: int,
    seed: int = 0,
    batch_size: int = 8,
    guidance_scale: float | None = None,
    hints: KindHints | None = None,
) -> Results:
    """Run the stock pipeline on every sample; a sample's noise depends on its index and the seed.

    Args:
        pipe: with or without a checkpoint in its transformer.
        conditioner: makes the prompt embeddings.
        dataset: the triplets; `result` is not read.
        steps: of denoising.
        seed: of the noise.
        batch_size: of images of one size.
        guidance_scale: for models with guidance embeddings.
        hints: for the router, by the kind of each sample.
    """
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    pipe.set_progress_bar_config(disable=True)
    for indices in BucketBatches(image_sizes(dataset), batch_size, seed=0).epoch(0):
        found |= predict(
            pipe,
            conditioner,
            dataset,
            indices,
            steps=steps,
            seed=seed,
            guidance_scale=guidance_scale,
            hints=hints,
        )
    ordered = [found[index] for index in sorted(found)]
    weights = [weight for _, weight in ordered if weight is not None]
    return Results([image for image, _ in ordered], weights)


@torch.no_grad()
def predict(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    dataset: RemovalDataset,
    indices: Sequence[int],
    *,
    steps: int,
    seed: int,
    guidance_scale: float | None = None,
    hints: KindHints | None = None,
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """Run the stock pipeline on samples of one size.

    Args:
        pipe: with or without a checkpoint in its transformer.
        conditioner: makes the prompt embeddings.
        dataset: the triplets.
        indices: of the samples.
        steps: of denoising.
        seed: of the noise.
        guidance_scale: for models with guidance embeddings.
        hints: for the router, by the kind of each sample.

    Returns:
        By index: the image `(3, H, W)` in [0, 1], and the routing weights `(E,)` as in `Results`.
    """
    items = [dataset[index] for index in indices]
    batch = {k: torch.stack([item[k] for item in items]) for k in items[0] if k != "result"}
    seen: list[Tensor] = []

    def note(
        pipe: FluxFillPipeline, step: int, timestep: Tensor, values: dict[str, Any]
    ) -> dict[str, Any]:
        decision = current_routing(pipe.transformer) if has_experts(pipe) else None
        if decision is not None:
            weights = decision.weights
            seen.append(weights.mean(1) if weights.ndim == 3 else weights)
        return {}

    with hints.given(pipe.transformer, batch) if hints else nullcontext():
        filled = fill(
            pipe,
            conditioner,
            batch,
            steps=steps,
            seeds=[seed * 1_000_003 + i for i in indices],
            guidance_scale=guidance_scale,
            callback_on_step_end=note,
        )
    if dataset.reading.diptych:
        filled = filled.tensor_split(2, dim=-1)[1]
    weights = list(torch.stack(seen).mean(0).cpu()) if seen else [None] * len(items)
    return dict(zip(indices, zip(filled.float().cpu(), weights, strict=True), strict=True))


def apply_to_all(
    vae: AutoencoderKL, found: Results, dataset: RemovalDataset, **surroundings: Any
) -> Results:
    """Apply the options `--outside` and `--seam` to all predictions of a data set.

    Args:
        vae: of the pipeline that made them.
        found: what the pipeline made, in the order of the samples.
        dataset: the triplets; `result` is not read.
        surroundings: options of `apply_surroundings`.
    """
    images = []
    for index, prediction in enumerate(found.images):
        item = dataset[index]
        source, mask = item["src"][None], cut(item["mask"])[None]
        images.append(apply_surroundings(vae, prediction[None], source, mask, **surroundings)[0])
    return Results(images, found.weights)


@torch.no_grad()
def fill(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    batch: dict[str, Tensor],
    *,
    steps: int,
    seeds: Sequence[int],
    guidance_scale: float | None = None,
    **others: Any,
) -> Tensor:
    """Run the stock pipeline on a batch.

    Args:
        pipe: with or without a checkpoint in its transformer.
        conditioner: makes the prompt embeddings.
        batch: `src` and `ref` `(B, 3, H, W)`, `mask` `(B, 1, H, W)`, in [0, 1]; `caption` `(B,)`
            where samples have their own.
        steps: of denoising.
        seeds: of every sample's noise.
        guidance_scale: for models with guidance embeddings.
        others: as the pipeline takes them.

    Returns:
        `(B, 3, H, W)`, in [0, 1].
    """
    guidance = guidance_for(pipe.transformer, guidance_scale, 1)
    prompt_embeds, pooled_embeds = conditioner(batch["ref"], batch.get("caption"))
    images: Tensor = pipe(
        image=batch["src"],
        mask_image=batch["mask"],
        height=batch["src"].shape[-2],
        width=batch["src"].shape[-1],
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled_embeds,
        guidance_scale=0.0 if guidance is None else guidance.item(),
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        **others,
    ).images
    return images


def has_experts(pipe: FluxFillPipeline) -> bool:
    """Tell whether a mixture of experts is loaded into the pipeline's transformer."""
    configs = getattr(pipe.transformer, "peft_config", {}).values()
    return any(isinstance(config, MoELoraConfig) for config in configs)


def regions(item: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return where to measure a sample: boolean maps `(H, W)` by the names of `REGIONS`."""
    mask = cut(item["mask"])[None]
    found = metrics.regions(mask, item["src"][None], item["result"][None])
    return {name: found[region][0, 0] for name, region in REGIONS.items()}


def cut(mask: Tensor) -> Tensor:
    """Make a mask of zeros and ones, as the pipeline does."""
    return (mask >= 0.5).float()


def measure_samples(images: list[Tensor], dataset: RemovalDataset) -> dict[str, MetricValues]:
    """Measure every sample by all metrics of `moe_lora.metrics.measure`, in the order of the data.

    Args:
        images: `(3, H, W)` each, in [0, 1].
        dataset: the triplets that they were made from.
    """
    return metrics.join(measure_one(image, dataset[i]) for i, image in enumerate(images))


def describe_samples(found: Results, dataset: RemovalDataset) -> list[dict[str, Any]]:
    """Return the stem, the size of the mask, the metrics and the routing weights of every sample.

    A metric of a region with fewer than `SMALLEST_REGION` pixels is None.
    """
    areas = torch.stack([dataset[i]["mask"].mean() for i in range(len(dataset))])
    sizes = metrics.mask_sizes(areas.view(-1, 1, 1, 1))
    samples: list[dict[str, Any]] = [
        {"stem": stem, "size": size} for stem, size in zip(dataset.stems, sizes, strict=True)
    ]
    for name, measured in measure_samples(found.images, dataset).items():
        values = measured.tolist(1 if name == "seam_error" else SMALLEST_REGION)
        for sample, value in zip(samples, values, strict=True):
            sample[name] = value
    if found.weights:
        for sample, weights in zip(samples, found.weights, strict=True):
            sample["routing"] = [round(weight, 4) for weight in weights.tolist()]
    return samples


def measure_one(image: Tensor, item: dict[str, Tensor]) -> dict[str, MetricValues]:
    """Measure one prediction `(3, H, W)` against its sample."""
    prediction, target, source = (value[None] for value in (image, item["result"], item["src"]))
    return metrics.measure(prediction, target, cut(item["mask"])[None], source)


def measure(images: list[Tensor], dataset: RemovalDataset) -> dict[str, float]:
    """Return the mean PSNR in dB against the target, for every region.

    The mean runs over the samples in which the region has at least `SMALLEST_REGION` pixels.
    """
    found = measure_samples(images, dataset)
    means = {k: found[f"psnr/{region}"].mean(SMALLEST_REGION) for k, region in REGIONS.items()}
    return {name: value for name, value in means.items() if value is not None}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Return measurements as a table: regions down, columns across, then the gain of the last.

    One column alone has no gain.

    >>> print(table({"base": {"whole": 20.0}, "ours": {"whole": 23.5}}))
    PSNR, dB      base    ours    gain
    whole        20.00   23.50   +3.50
    """
    names = list(columns)
    heads = [*names, "gain"] if len(names) > 1 else names
    lines = ["PSNR, dB  " + "".join(f"{name:>8}" for name in heads)]
    for region in columns[names[0]]:
        values = [columns[name][region] for name in names]
        row = "".join(f"{value:8.2f}" for value in values)
        gain = f"{values[-1] - values[0]:+8.2f}" if len(names) > 1 else ""
        lines.append(f"{region:<10}{row}{gain}")
    return "\n".join(lines)
