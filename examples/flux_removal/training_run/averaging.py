"""Averages of the trained weights, and the model with these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from training_run.optimizers import is_schedule_free, use_averaged_weights, use_training_weights
from training_run.sharding import scatter


class WeightAverage:
    """Exponential moving average of weights.

    After update n = 0, 1, …: average ← d·average + (1 − d)·weights, d = min(decay, (1+n)/(10+n)).
    The smaller decay of the first updates removes the initial weights, as in diffusers' `EMAModel`.

    Args:
        model: the unwrapped model; its trained parameters are averaged.
        decay: in (0, 1).
        start: the average at the start, by name; the present weights where it lacks them.
    """

    def __init__(
        self, model: nn.Module, decay: float, start: Mapping[str, Tensor] | None = None
    ) -> None:
        self.decay, self.updates = decay, 0
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters = list(named.values())
        self.weights = [
            scatter((start or {}).get(n, p.detach()), p).float().clone() for n, p in named.items()
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights, after a step of the optimizer."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.weights, self.parameters, strict=True):
            average.lerp_(parameter.to(average.dtype), 1 - decay)
        self.updates += 1


def has_average(optimizer: Optimizer, average: WeightAverage | None) -> bool:
    """Tell whether a run has averaged weights, of its own or of a schedule-free optimizer."""
    return average is not None or is_schedule_free(optimizer)


@contextmanager
def averaged(optimizer: Optimizer, average: WeightAverage | None) -> Iterator[None]:
    """Put the averaged weights into the model while the context is open.

    Afterwards the trained weights are in it again, to the last bit. A run without an average keeps
    its weights.

    Args:
        optimizer: the run's.
        average: the run's, if any.
    """
    if not has_average(optimizer, average):
        yield
        return
    if average is not None:
        parameters = average.parameters
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        if average is not None:
            _copy(average.weights, parameters)
        else:
            use_averaged_weights(optimizer)
        yield
    finally:
        if average is None:
            use_training_weights(optimizer)
        _copy(kept, parameters)


@torch.no_grad()
def _copy(values: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)
