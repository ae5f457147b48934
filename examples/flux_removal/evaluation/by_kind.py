"""Measure predictions by kind of removal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import FluxFillPipeline
from torch import Tensor, nn

from evaluation.measuring import REGIONS, SMALLEST_REGION, measure_one, run_pipeline
from flux_fill.models import Conditioner
from moe_lora import metrics
from moe_lora.ablation import Specialization, specialization
from removal_data.dataset import RemovalDataset

Means = dict[str, dict[str, float | None]]


def samples_of_kinds(dataset: RemovalDataset) -> dict[str, list[int]]:
    """Return the indices of the samples of each kind, in the order in which kinds appear."""
    found: dict[str, list[int]] = {kind: [] for kind in dataset.kinds}
    for index, sample in enumerate(dataset.samples):
        if sample.kind is not None:
            found[sample.kind].append(index)
    return found


def measure_by_kind(images: list[Tensor], dataset: RemovalDataset) -> Means:
    """Return the mean PSNR in dB against the target by kind and region.

    A region that no sample of a kind has, such as effects that stay, is None.

    Args:
        images: `(3, H, W)` each, in [0, 1], in the order of the samples.
        dataset: the triplets, whose manifest names kinds.
    """
    means: Means = {}
    for kind, indices in samples_of_kinds(dataset).items():
        found = metrics.join(measure_one(images[i], dataset[i]) for i in indices)
        means[kind] = {
            name: found[f"psnr/{region}"].mean(SMALLEST_REGION) for name, region in REGIONS.items()
        }
    return means


def specialization_by_kind(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    dataset: RemovalDataset,
    experts: Sequence[str],
    *,
    steps: int,
) -> Specialization:
    """Leave out one expert at a time, and see what the effect region of each kind loses, in dB.

    Args:
        pipe: with a mixture in its transformer.
        conditioner: makes the prompt embeddings.
        dataset: the triplets, whose manifest names kinds.
        experts: of the kinds, in the order of `samples_of_kinds`.
        steps: of denoising.
    """
    indices = samples_of_kinds(dataset)

    def evaluate(model: nn.Module, dataset: RemovalDataset) -> dict[str, Tensor]:
        images = run_pipeline(pipe, conditioner, dataset, steps=steps).images
        measured = [measure_one(image, dataset[i]) for i, image in enumerate(images)]
        effect = [found["psnr/effect"].tolist(SMALLEST_REGION)[0] for found in measured]
        numbers = torch.tensor([math.nan if value is None else value for value in effect])
        return {kind: numbers[indices[kind]] for kind in indices}

    pairs = dict(zip(experts, indices, strict=True))
    return specialization(
        pipe.transformer, [dataset], evaluate, higher_is_better=list(indices), pairs=pairs
    )


def kind_table(means: Means, base: Means | None = None) -> str:
    """Return a table with a row for each kind and a column for each region.

    Args:
        means: of `measure_by_kind`.
        base: what the gains in parentheses are against.

    Example:
        >>> print(kind_table({"glow": {"whole": 20.5, "shadow": None}}, {"glow": {"whole": 20.0}}))
        PSNR, dB             whole          effect
        glow         20.50 (+0.50)               -
    """
    regions = list(next(iter(means.values())))
    titles = ["effect" if region == "shadow" else region for region in regions]
    wide = 16 if base else 10
    lines = ["PSNR, dB  " + "".join(f"{title:>{wide}}" for title in titles)]
    for kind, values in means.items():
        cells = []
        for region in regions:
            value = values[region]
            before = base[kind].get(region) if base else None
            gain = "" if value is None or before is None else f" ({value - before:+.2f})"
            cells.append("-" if value is None else f"{value:.2f}{gain}")
        lines.append(f"{kind:<10}" + "".join(f"{cell:>{wide}}" for cell in cells))
    return "\n".join(lines)
