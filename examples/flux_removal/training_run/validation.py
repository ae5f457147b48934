"""Validate a run on held-out scenes: removals and their metrics, and the loss."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import moe_lora
from evaluation.comparison_sheet import draw_comparison
from evaluation.measuring import SMALLEST_REGION, cut, measure_one, predict
from flux_fill.kind_hints import KindHints
from flux_fill.surroundings import apply_surroundings
from moe_lora import flow, metrics
from moe_lora.losses import base_loss
from moe_lora.metrics import MetricValues
from removal_data.batches import BucketBatches, image_sizes, seed_at, to_device
from removal_data.dataset import RemovalDataset
from removal_data.held_out import spread
from reporting.reporter import Reporter
from training_run.best_checkpoint import BestCheckpoint
from training_run.forward import predict_velocity
from training_run.model_card import ModelCardWriter, Validated
from training_run.parts import Parts

SIGMAS = (0.125, 0.375, 0.625, 0.875)
"""Noise levels of the held-out loss."""


@dataclass
class Scene:
    """Hold what a validation found in one scene.

    Attributes:
        image: `(3, H, W)`, uint8: the removal.
        measured: metrics of the image, each of one value.
        loss: flow-matching loss, averaged over `SIGMAS`.
    """

    image: Tensor
    measured: dict[str, MetricValues]
    loss: float


@contextmanager
def as_in_inference(parts: Parts) -> Iterator[None]:
    """Run the model as inference does: no gradient, dropout or task hint.

    Afterwards the modes of all modules, the random number generators and the routing statistics are
    what they were.
    """
    accelerator, model, pipe = parts.accelerator, parts.model, parts.pipe
    transformer = pipe.transformer
    modes = {module: module.training for module in model.modules()}
    mixed = parts.options.mixed
    stats = moe_lora.routing_stats(model) if mixed else None
    counted = copy.copy(stats)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    hints = moe_lora.router_inputs(model) if mixed else nullcontext()
    if accelerator.distributed_type == DistributedType.FSDP:
        # Weights are gathered by hooks of the prepared model.
        pipe.transformer = accelerator.unwrap_model(model)
    try:
        model.eval()
        with torch.random.fork_rng(devices), torch.no_grad(), accelerator.autocast(), hints:
            yield
    finally:
        pipe.transformer = transformer
        for module in model.modules():
            if isinstance(module, FSDPModule):  # without a backward pass some stay gathered
                module.reshard()
        for module, training in modes.items():
            module.training = training
        if stats is not None:
            vars(stats).update(vars(counted))


class Validator:
    """Validate on the same scenes, with the same noise, every time.

    All processes take their share of the scenes, make equally many calls of the model, and end up
    with the same results.

    Args:
        parts: the models of the run.
        scenes: held-out triplets, of which at most `validation_samples` are used.
        reporter: of the run.
        card: the model card, which receives the results.
        hints: for the router, by the kind of each scene.
    """

    def __init__(
        self,
        parts: Parts,
        scenes: RemovalDataset,
        reporter: Reporter,
        card: ModelCardWriter,
        hints: KindHints | None = None,
    ) -> None:
        options, accelerator = parts.options, parts.accelerator
        self.parts, self.reporter, self.card, self.hints = parts, reporter, card, hints
        parts.pipe.set_progress_bar_config(disable=True)
        self.scenes = spread(scenes, options.validation_samples)
        self.batches = BucketBatches(
            image_sizes(self.scenes),
            options.batch_size,
            seed=0,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        ).epoch(0)
        settings = {
            "scenes": self.scenes.stems,
            "denoising_steps": options.validation_denoising_steps,
            "seed": options.validation_seed,
        }
        self.best = BestCheckpoint(
            Path(options.output_dir), options.validation_metric, settings, card
        )
        if self.best.note:
            reporter.say(self.best.note, logging.WARNING)

    def due(self, step: int) -> bool:
        """Tell whether to validate after a step; 0 is before the first one."""
        options = self.parts.options
        if step == 0:
            return options.validation_at_start
        return step % options.validation_steps == 0 or step == self.reporter.total_steps

    def __call__(self, step: int) -> None:
        """Validate, report, and keep the checkpoint if it is the best; called by every process.

        Args:
            step: optimizer steps done.
        """
        start = time.perf_counter()
        with as_in_inference(self.parts):
            found = self.find()
        means = mean_values([scene for _, scene in found])
        sheet = self.reporter.folder / "validation" / f"step-{step:06d}.png"
        if self.parts.accelerator.is_main_process:
            self.draw(found, step, sheet)
        self.card.validated = Validated(step, means, sheet, len(found))
        self.reporter.validation(step, means, sheet, time.perf_counter() - start)
        # Before the first step there is nothing to keep.
        if step and self.best.update(self.parts, step, means):
            self.reporter.say(self.best.describe())

    def find(self) -> list[tuple[int, Scene]]:
        """Return the results of all processes, in the order of the scenes."""
        mine: dict[int, Scene] = {}
        for indices in self.batches:
            mine |= self.find_batch(indices)
        found: list[tuple[int, Scene]] = list(mine.items())
        if self.parts.accelerator.num_processes > 1:
            found = gather_object(found)
        return sorted(dict(found).items())

    def find_batch(self, indices: Sequence[int]) -> dict[int, Scene]:
        """Remove the objects of scenes of one size, and compute the losses."""
        parts, options = self.parts, self.parts.options
        images = predict(
            parts.pipe,
            parts.conditioner,
            self.scenes,
            indices,
            steps=options.validation_denoising_steps,
            seed=options.validation_seed,
            guidance_scale=options.guidance_scale,
            hints=self.hints,
        )
        singles, found = self.scenes.singles(), {}
        for index, loss in zip(indices, self.losses(indices), strict=True):
            item, prediction = singles[index], images[index][0]
            finished = apply_surroundings(
                parts.pipe.vae, prediction[None], item["src"][None], cut(item["mask"])[None]
            )[0]
            image = (finished.clamp(0, 1) * 255).round().byte()
            found[index] = Scene(image, measure_one(finished, item), loss)
        return found

    def losses(self, indices: Sequence[int]) -> list[float]:
        """Return the flow-matching loss of every scene, at fixed noise and noise levels."""
        parts, seed = self.parts, self.parts.options.validation_seed
        items = [self.scenes[index] for index in indices]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        batch = to_device(batch, parts.accelerator.device)
        torch.manual_seed(seed_at(seed, indices[0]))  # the encoder draws latents
        latents, prompt = parts.encoder(batch), parts.conditioner.of_batch(batch)
        drawn = [torch.Generator().manual_seed(seed_at(seed, index)) for index in indices]
        noise = torch.stack([torch.randn(latents.x0.shape[1:], generator=g) for g in drawn])
        noise = noise.to(latents.x0)
        model = parts.accelerator.unwrap_model(parts.model)
        total = torch.zeros(len(indices), device=noise.device)
        for level in SIGMAS:
            sigma = torch.full((len(indices),), level, device=noise.device)
            x_t = flow.interpolate(latents.x0, noise, sigma)
            with self.hints.given(model, batch) if self.hints else nullcontext():
                velocity = predict_velocity(model, parts, latents, x_t, sigma, prompt)
            target = flow.velocity(latents.x0, noise)
            total += base_loss(velocity, target, reduction="none") / len(SIGMAS)
        return total.tolist()

    def draw(self, found: Sequence[tuple[int, Scene]], step: int, path: Path) -> None:
        """Draw a contact sheet."""
        path.parent.mkdir(parents=True, exist_ok=True)
        images = [scene.image.float() / 255 for _, scene in found]
        draw_comparison(self.scenes.singles(), {f"step {step}": images}, path)


def mean_values(scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the loss and the metrics of a validation, averaged as `evaluate.py` does."""
    means = {"loss": sum(scene.loss for scene in scenes) / len(scenes)}
    for name, values in metrics.join(scene.measured for scene in scenes).items():
        mean = values.mean(1 if name == "seam_error" else SMALLEST_REGION)
        if mean is not None:
            means[name] = mean
    return means
