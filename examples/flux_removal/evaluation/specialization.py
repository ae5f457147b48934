"""Measure what the experts of a checkpoint are for, by the losses and metrics of the task."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evaluation.measuring import SMALLEST_REGION, cut, fill
from flux_fill.frozen_transformer import load_transformer
from flux_fill.models import Conditioner, load_checkpoint, load_pipeline
from moe_lora import metrics
from moe_lora.ablation import Specialization, specialization
from options.train_options import TrainOptions
from removal_data.batches import BucketBatches, LatentEncoder, image_sizes, to_device
from removal_data.dataset import RemovalDataset
from train import training_step
from training_run.losses import build_loss
from training_run.parts import Parts

REGIONS = tuple(f"psnr/{region}" for region in ("inside", "outside", "boundary", "effect"))


def measure_specialization(
    options: TrainOptions,
    checkpoint: Path,
    dataset: RemovalDataset,
    *,
    samples: int = 16,
    steps: int = 4,
) -> Specialization:
    """Leave out one expert of a checkpoint at a time, and see what rises.

    Losses are those of the training, with its noise levels; metrics are those of images that the
    stock pipeline makes.

    Args:
        options: of the training.
        checkpoint: of a mixture.
        dataset: that training has not seen.
        samples: how many of it, at even distances.
        steps: of denoising.
    """
    accelerator = Accelerator()
    pipe = load_pipeline(options.flux_fill_id, device=accelerator.device, transformer=False)
    pipe.set_progress_bar_config(disable=True)
    conditioner = Conditioner(pipe, prompt=options.prompt, redux_id=options.flux_redux_id)
    load_transformer(pipe, options.flux_fill_id, device=accelerator.device)
    load_checkpoint(pipe, checkpoint)
    model = pipe.transformer.to(accelerator.device)
    parts = Parts(accelerator, pipe, model, LatentEncoder(pipe), conditioner, options)
    loss = build_loss(options, pipe.vae)
    chosen, sizes = range(0, len(dataset), max(1, len(dataset) // samples)), image_sizes(dataset)
    deal = BucketBatches([sizes[i] for i in chosen[:samples]], options.batch_size, seed=0)
    batches = [[chosen[i] for i in indices] for indices in deal.epoch(0)]

    def evaluate(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = to_device(batch, accelerator.device)
        _, output, sigma = training_step(batch, parts, loss)
        measured = bool((sigma <= loss.max_sigma).any())  # else there is no pixel loss to speak of
        found = {
            name: value if name == "base" or measured else torch.tensor(math.nan)
            for name, value in output.components.items()
        }
        seeds = range(len(sigma))
        images = fill(pipe, conditioner, batch, steps=steps, seeds=seeds).to(batch["result"])
        region = metrics.measure(images, batch["result"], cut(batch["mask"]), batch["src"])
        for name in REGIONS:
            there = region[name].present(SMALLEST_REGION)
            found[name] = torch.where(there, region[name].values, math.nan)
        return found

    return specialization(
        model,
        DataLoader(dataset, batch_sampler=batches),
        evaluate,
        higher_is_better=REGIONS,
    )
