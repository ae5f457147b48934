"""Tell how a run goes: `training.log`, `metrics.jsonl`, curves and images in trackers."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import defaultdict
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

import moe_lora
from moe_lora import RemovalLoss
from moe_lora.losses import RemovalLossOutput
from options.train_options import TrainOptions
from options.yaml_files import given_options
from reporting.routing_figures import RoutingFigures, usage_over_training
from reporting.trackers import FigureWriter, log_image, start_trackers, takes_images

RUN_NAME = "flux_removal"
LOG, METRICS = "training.log", "metrics.jsonl"
VALIDATIONS, SHEETS = "validation.jsonl", "validation"


class TerminalHandler(logging.Handler):
    """Write log lines to the terminal, above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


def put_aside(folder: Path) -> None:
    """Rename the logs of an earlier run: training.log becomes training-1.log, and so on."""
    names = (LOG, METRICS, VALIDATIONS, SHEETS, RUN_NAME)

    def renamed(name: str, number: int) -> Path:
        path = folder / name
        return path.with_name(f"{path.stem}-{number}{path.suffix}")

    free = next(
        n for n in itertools.count(1) if not any(renamed(name, n).exists() for name in names)
    )
    for name in names:
        if (folder / name).exists():
            (folder / name).rename(renamed(name, free))


class LossWindow:
    """Average losses since the last log entry, over all processes, without waiting for devices."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self.sigma = torch.zeros(0)

    def add(
        self, loss: RemovalLoss, output: RemovalLossOutput, total: Tensor, sigma: Tensor
    ) -> None:
        """Add a batch: the components, what they contribute to `total`, and how many samples."""
        self.sigma = sigma.detach()  # of the last batch
        passed = (sigma <= loss.max_sigma).sum()
        self._add("batches", torch.ones(()))
        self._add("total", total)
        for name, value in output.components.items():
            count = torch.tensor(len(sigma)) if name == "base" else passed
            self._add(f"contribution/{name}", loss.weights[name] * value)
            self._add(f"sum/{name}", value * count.to(value.device))
            self._add(f"count/{name}", count)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self.sums[name] = self.sums[name].to(value.device) + value

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        """Return `total`, `contribution/NAME` and `loss/NAME`, and start anew.

        A component's loss is the mean over the samples that it was computed on, NaN if none was.
        """
        names = sorted(self.sums)
        stacked = torch.stack([self.sums[name].to(accelerator.device) for name in names])
        reduced = accelerator.reduce(stacked, reduction="sum").tolist()
        found = dict(zip(names, reduced, strict=True))
        self.sums.clear()
        means = {"total": found["total"] / found["batches"]}
        for name in names:
            kind, _, component = name.partition("/")
            if kind == "contribution":
                means[name] = found[name] / found["batches"]
            if kind == "sum":
                count = found[f"count/{component}"]
                means[f"loss/{component}"] = found[name] / count if count else math.nan
        return means


class Reporter:
    """Write a run's log lines and curves; only the main process writes.

    Args:
        accelerator: the run's; its trackers are started here.
        options: the run's.
        total_steps: optimizer steps in the whole run.
        steps_per_epoch: optimizer steps in an epoch.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        options: TrainOptions,
        *,
        total_steps: int,
        steps_per_epoch: int,
    ) -> None:
        self.accelerator, self.options = accelerator, options
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.window, self.collapsed = LossWindow(), False
        self.figures: RoutingFigures | None = None
        assert options.logging_dir is not None  # TrainOptions fills it in
        self.folder = Path(options.logging_dir)
        self.logger = logging.getLogger(RUN_NAME)
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            if options.resume_from_checkpoint is None:
                put_aside(self.folder)
            self.logger.handlers = [logging.FileHandler(self.folder / LOG), TerminalHandler()]
            for handler in self.logger.handlers:
                handler.setFormatter(logging.Formatter("%(levelname)s - %(message)s"))
        else:
            self.logger.handlers = [logging.NullHandler()]
        start_trackers(accelerator, RUN_NAME, given_options(options))

    def progress_bar(self, step: int) -> tqdm[NoReturn]:
        """Return a bar that stands at a step; the main process shows it."""
        return tqdm(
            total=self.total_steps,
            initial=step,
            desc="training",
            disable=not self.accelerator.is_main_process,
        )

    def say(self, message: str, level: int = logging.INFO) -> None:
        """Write a line to the log and to the terminal."""
        self.logger.log(level, message)

    def entry(
        self,
        step: int,
        model: nn.Module,
        mode: str,
        curves: dict[str, float],
        batch: dict[str, Tensor] | None = None,
    ) -> str:
        """Write what happened since the last entry; called by every process.

        Args:
            step: optimizer steps done.
            model: the adapted model, whose routing statistics start anew (this process's).
            mode: "routed" or "uniform".
            curves: further numbers for the trackers.
            batch: the last one, whose masks the figures show; the weights are the model's last.

        Returns:
            The entry in a few words.
        """
        values = curves | self.window.means(self.accelerator)
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        epoch = (step - 1) // self.steps_per_epoch + 1
        self.logger.info("Epoch %d/%d, Step %d/%d", epoch, epochs, step, self.total_steps)
        shares = {
            name.partition("/")[2]: value
            for name, value in values.items()
            if name.startswith("contribution/")
        }
        told = "".join(f", {name.capitalize()}: {value:.4f}" for name, value in shares.items())
        self.logger.info("Total Loss: %.4f%s", values["total"], told)
        losses = ", ".join(f"{name}={values[f'loss/{name}']:.4f}" for name in shares)
        self.logger.info("Component Losses: %s", losses)
        if self.options.mixed:
            values |= self._routing(model, mode)
        self._write(values, step)
        if self.options.mixed and self.accelerator.is_main_process:
            self._draw(step, model, batch)
        return f"loss {values['total']:.4f}, {mode}"

    def validation(self, step: int, values: dict[str, float], sheet: Path, seconds: float) -> None:
        """Write the results of a validation; called by every process.

        Args:
            step: optimizer steps done.
            values: loss and metrics.
            sheet: contact sheet, which exists on the main process.
            seconds: that it took.
        """
        told = ", ".join(
            f"{name}={value:.4f}" for name, value in values.items() if not name.startswith("ssim/")
        )
        self.say(f"Validation, Step {step}/{self.total_steps}: {told} ({seconds:.1f} s)")
        if not self.accelerator.is_main_process:
            return
        curves = {f"validation/{name}": value for name, value in values.items()}
        self.accelerator.log(curves, step=step)
        with Image.open(sheet) as image:
            log_image(self.accelerator, "validation/removals", image, step)
        with (self.folder / VALIDATIONS).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def _routing(self, model: nn.Module, mode: str) -> dict[str, float]:
        stats = moe_lora.routing_stats(model)
        experts = len(stats.expert_names)
        strategy: str = self.options.routing_strategy
        if mode == "uniform":
            stats.reset()
            stats.update(torch.full((1, experts), 1 / experts))
            strategy = "uniform"
        adapted = self.accelerator.unwrap_model(model)
        temperature = adapted.peft_config[adapted.active_adapter].routing_temperature
        self.logger.info(stats.log_line())
        if mode == "routed":
            self.logger.info("Routing Statistics: %s", json.dumps(rounded(stats.as_dict())))
        self.logger.info("Routing Temperature: %s, Strategy: %s", round(temperature, 4), strategy)
        # A hint such as removal_only leaves one expert alone on purpose.
        wanted = (self.options.task_hint or "").endswith("_only")
        collapsed = mode == "routed" and stats.is_collapsed() and not wanted
        if collapsed and not self.collapsed:
            self.say(stats.collapse_warning() or "", logging.WARNING)
        self.collapsed = collapsed
        values = dict(zip(stats.expert_names, stats.mean_weights, strict=True))
        found = {f"routing/{name}": value for name, value in values.items()}
        if mode == "routed":
            found |= {f"routing/expert_{i}_usage": n for i, n in enumerate(stats.usage)}
        found["routing/entropy"] = stats.entropy
        found["routing/temperature"] = temperature
        found["routing/idle_experts"] = len(stats.idle_experts())
        stats.reset()
        return found

    def _draw(self, step: int, model: nn.Module, batch: dict[str, Tensor] | None) -> None:
        if not any(map(takes_images, self.accelerator.trackers)):
            return
        if self.figures is None:
            names = moe_lora.routing_stats(model).expert_names
            self.figures = RoutingFigures(FigureWriter(self.accelerator), names)
        decision = moe_lora.current_routing(model)
        if decision is not None:
            self.figures.note(decision.weights, self.window.sigma, batch)
        last = step == self.total_steps
        if last or (decision is not None and self.figures.due):
            self.figures.draw(step)
        if last:
            figure = usage_over_training(self.folder / METRICS)
            self.figures.writer.add_figure("routing/usage", figure, step)

    def _write(self, values: dict[str, float], step: int) -> None:
        curves = {
            "loss/total" if name == "total" else name: value
            for name, value in values.items()
            if not name.startswith("contribution/") and math.isfinite(value)
        }
        self.accelerator.log(curves, step=step)
        if self.accelerator.is_main_process:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps({"step": step, **curves}) + "\n")


def rounded(statistics: dict[str, int | list[float]]) -> dict[str, int | list[float]]:
    """Return routing statistics with weights of two decimals."""
    return {
        name: [round(weight, 2) for weight in value] if isinstance(value, list) else value
        for name, value in statistics.items()
    }


def mask_curves(batch: dict[str, Tensor]) -> dict[str, float]:
    """Return what the mask analysis finds in a batch, on average."""
    info = moe_lora.extract_mask_info_from_batch(batch)
    names = ("area_ratio", "edge_complexity", "boundary_smoothness", "detail_complexity")
    return {f"mask/{name}": info[name].mean().item() for name in names}
