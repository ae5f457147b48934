"""One model for all visitors: removals run one after another, each with its own routing."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image
from torch import Tensor

import moe_lora
from flux_fill.models import Conditioner, load_checkpoint, load_pipeline
from flux_fill.surroundings import OUTSIDE
from image_session.remove_call import count_crops, remove_from_image
from image_session.routing_trace import (
    ObservedPipeline,
    OnStep,
    RoutingTrace,
    has_experts,
    router_of,
)
from moe_lora.export import ExportReport

MOST_STEPS, MOST_SEEDS = 50, 4
"""What one request may ask for."""

ExportFormat = Literal["diffusers", "kohya"]
"""Layouts that are a single file."""

OnProgress = Callable[[float, str], None]
"""Called with the share that is done, and what is being done; what it raises ends the removal."""


@dataclass(frozen=True, kw_only=True)
class RemovalSettings:
    """What a visitor chose.

    Attributes:
        steps: of denoising, in [1, MOST_STEPS].
        seed: of the noise of the first image.
        count: images with consecutive seeds, in [1, MOST_SEEDS].
        outside: what becomes of the image outside of the mask, see `remove.py --outside`.
        crop: run on crops around the mask, as `remove.py` does, instead of on the whole image.
        task_hint: for the router, such as "removal_focus"; `None` lets it decide by itself.
        weights: one per expert, instead of the router's; they are divided by their sum.
        without: the expert that is left out; the others keep their weights.
    """

    steps: int = 20
    seed: int = 0
    count: int = 1
    outside: str = "keep"
    crop: bool = False
    task_hint: str | None = None
    weights: tuple[float, ...] | None = None
    without: str | None = None

    def __post_init__(self) -> None:
        limits = {"steps": (1, MOST_STEPS), "count": (1, MOST_SEEDS), "seed": (0, 2**31)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"Expected `{name}` to be in [{low}, {high}], but got {value}.")
        if self.outside not in OUTSIDE:
            raise ValueError(
                f"Expected `outside` to be one of {list(OUTSIDE)}, but got {self.outside!r}."
            )
        if self.weights is not None:
            if min(self.weights) < 0 or not 0 < sum(self.weights) < float("inf"):
                raise ValueError(
                    "Expected `weights` >= 0 with at least one above 0, but got "
                    f"{list(self.weights)}."
                )
            total = sum(self.weights)
            object.__setattr__(self, "weights", tuple(value / total for value in self.weights))


@dataclass(frozen=True)
class Removal:
    """One result.

    Attributes:
        image: mode RGB, of the source's size.
        seed: of its noise.
        settings: of the request.
        trace: the routing weights that acted, in the last of several crops; `None` for a model
            without experts.
    """

    image: Image.Image
    seed: int
    settings: RemovalSettings
    trace: RoutingTrace | None


class RemovalSession:
    """A pipeline with a checkpoint, which any number of threads may use.

    Args:
        flux_fill_id: folder or Hub id of the base model.
        checkpoint: a folder checkpoint-N; `None` for the base model alone.
        device: where to run.
        dtype: of the weights.
        prompt: as in training.
        flux_redux_id: as in training.
        redux_scale: as in training.

    Raises:
        FileNotFoundError: when model or checkpoint are missing.
        ValueError: when the model is not a FLUX Fill model.
    """

    def __init__(
        self,
        flux_fill_id: str,
        checkpoint: Path | None,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        prompt: str | None = None,
        flux_redux_id: str | None = None,
        redux_scale: float = 1.0,
    ) -> None:
        self.pipe = load_pipeline(flux_fill_id, dtype=dtype, device=device)
        self.pipe.set_progress_bar_config(disable=True)
        if checkpoint is not None:
            load_checkpoint(self.pipe, checkpoint)
        self.conditioner = Conditioner(
            self.pipe, prompt=prompt, redux_id=flux_redux_id, redux_scale=redux_scale
        )
        self._lock = threading.Lock()

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The experts in the order of their weights; empty without a mixture."""
        if not has_experts(self.pipe):
            return ()
        return moe_lora.routing_stats(self.pipe.transformer).expert_names

    @property
    def task_hints(self) -> tuple[str, ...]:
        """Hints that the router knows; empty without a router."""
        return moe_lora.routing.task_hints(self.expert_names) if router_of(self.pipe) else ()

    def remove(
        self,
        image: Image.Image,
        mask: Image.Image,
        settings: RemovalSettings,
        on_progress: OnProgress = lambda share, text: None,
    ) -> list[Removal]:
        """Remove what a mask covers, once per seed.

        Args:
            image: mode RGB.
            mask: mode L, 0 and 255, of the same size; white = remove.
            settings: of the request.
            on_progress: called before the first and after every step.

        Raises:
            ValueError: for an empty mask, or for experts and hints that the model lacks.
        """
        if mask.getextrema()[1] == 0:
            raise ValueError("Expected a mask that covers something, but nothing is painted.")
        without = self._index_of(settings.without)
        calls = count_crops(self.pipe, mask) if settings.crop else 1
        removals = []
        with self._lock, self._steered(settings):
            for index in range(settings.count):
                report = progress_of(on_progress, index, settings.count, calls)
                observed = ObservedPipeline(self.pipe, report)
                result = remove_from_image(
                    observed,
                    self.conditioner,
                    image,
                    mask,
                    steps=settings.steps,
                    seed=settings.seed + index,
                    outside=settings.outside,
                    crop=settings.crop,
                )
                trace = observed.trace(weights=settings.weights, without=without)
                removals.append(Removal(result, settings.seed + index, settings, trace))
        return removals

    def export(
        self, weights: Tensor, path: Path, *, format: ExportFormat = "diffusers"
    ) -> ExportReport:
        """Write the mixture under fixed weights as one plain LoRA file.

        Args:
            weights: `(E,)`.
            path: of the file, ending with .safetensors.
            format: one of `ExportFormat`.

        Raises:
            ValueError: for another format, a model without experts, or what `export_lora` refuses.
        """
        if format not in get_args(ExportFormat):
            raise ValueError(
                f"Expected `format` to be one of {list(get_args(ExportFormat))}, but got "
                f"{format!r}."
            )
        if not self.expert_names:
            raise ValueError("Expected a checkpoint with experts to export, but none is loaded.")
        with self._lock:
            return moe_lora.export_lora(self.pipe.transformer, path, weights, format=format)

    def _index_of(self, expert: str | None) -> int | None:
        if expert is None:
            return None
        if expert not in self.expert_names:
            raise ValueError(f"Expected one of {list(self.expert_names)}, but got {expert!r}.")
        return self.expert_names.index(expert)

    @contextlib.contextmanager
    def _steered(self, settings: RemovalSettings) -> Iterator[None]:
        """Apply hint, weights and ablation in this thread alone."""
        transformer = self.pipe.transformer
        with contextlib.ExitStack() as stack:
            if settings.task_hint is not None:
                if settings.task_hint not in self.task_hints:
                    raise ValueError(
                        f"Expected one of {list(self.task_hints)}, but got {settings.task_hint!r}."
                    )
                hint = settings.task_hint
                stack.enter_context(moe_lora.router_inputs(transformer, task_hint=hint))
            if settings.weights is not None:
                weights = torch.tensor(settings.weights, device=transformer.device)
                stack.enter_context(moe_lora.route(transformer, weights))
            if settings.without is not None:
                stack.enter_context(moe_lora.ablation.ablate_expert(transformer, settings.without))
            yield


def progress_of(on_progress: OnProgress, index: int, count: int, calls: int) -> OnStep:
    """Announce one of several images, and return what reports the steps of its calls.

    Args:
        on_progress: of the visitor.
        index: of the image.
        count: how many images.
        calls: how often the pipeline is called for each.
    """
    label = f"Image {index + 1} of {count}"
    on_progress(index / count, label)

    def report(call: int, done: int, steps: int) -> None:
        part = "" if calls == 1 else f", crop {call + 1} of {calls}"
        share = (index + (call + done / steps) / calls) / count
        on_progress(share, f"{label}{part}: step {done} of {steps}")

    return report
