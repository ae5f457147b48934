"""Measure the first steps of a run, and say how long the others will take."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from training_run.averaging import has_average

if TYPE_CHECKING:
    from training_run.parts import Run

MEASURED_STEPS = 10


def checkpoint_bytes(
    model: nn.Module, optimizer: Optimizer, *, experts: bool, average: bool = False
) -> int:
    """Return the bytes of the tensors in a checkpoint, once the optimizer has its state.

    Args:
        model: the unwrapped model.
        optimizer: the run's.
        experts: whether the checkpoint also has every expert as a plain LoRA.
        average: whether it has the weights before averaging, too.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    states = [value for state in optimizer.state.values() for value in state.values()]
    kept = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    return trained * (1 + experts + average) + kept


class StepClock:
    """Measure the steps after the first one, which also compiles and allocates.

    Args:
        device: of the model; kernels that are still running are waited for, twice in a run.
        steps: to measure, the first one included.
    """

    def __init__(self, device: torch.device, steps: int = MEASURED_STEPS) -> None:
        self.device, self.steps = device, steps
        self.done, self.seconds = 0, 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure what happens inside the context, as long as there are steps to measure."""
        if self.done >= self.steps:
            yield
            return
        start = time.perf_counter()
        yield
        if self.device.type == "cuda" and self.done in (0, self.steps - 1):
            torch.cuda.synchronize(self.device)
        if self.done:
            self.seconds += time.perf_counter() - start

    def count(self) -> float | None:
        """Count a step, and return the mean seconds of a step when all are measured."""
        self.done += 1
        return self.seconds / (self.steps - 1) if self.done == self.steps else None


def describe_rest(run: Run, seconds: float) -> str:
    """Return a line for the log: time and disk that the rest of a run needs.

    Args:
        run: with steps done.
        seconds: of a step.
    """
    options, step, total = run.parts.options, run.progress.step, run.reporter.total_steps
    every = options.checkpointing_steps
    # That of this step is still to be written.
    checkpoints = total // every - (step - 1) // every + (total % every != 0)
    model = run.parts.accelerator.unwrap_model(run.parts.model)
    size = checkpoint_bytes(
        model,
        run.optimizer,
        experts=options.mixed,
        average=has_average(run.optimizer, run.average),
    )
    return forecast(seconds, total - step, checkpoints, size)


def forecast(seconds: float, steps: int, checkpoints: int, size: int) -> str:
    """Return a line for the log.

    Args:
        seconds: of a step.
        steps: that are left.
        checkpoints: that are still to be written.
        size: of a checkpoint, in bytes.

    Example:
        >>> forecast(2.5, 990, 2, 2**29)
        'Time: 2.50 s per step, 990 steps left in about 0:41:15, without validations and \
checkpoints. Disk: 0.500 GiB per checkpoint, 2 to come.'
    """
    left = datetime.timedelta(seconds=round(seconds * steps))
    return (
        f"Time: {seconds:.2f} s per step, {steps} steps left in about {left}, without validations "
        f"and checkpoints. Disk: {size / 2**30:.3f} GiB per checkpoint, {checkpoints} to come."
    )
