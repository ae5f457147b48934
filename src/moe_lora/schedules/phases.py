"""Phases of a training schedule, and the settings of one training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from moe_lora.losses.expert_table import LOSS_COMPONENTS, SPECIALIZED_LOSSES
from moe_lora.routing.state import RoutingMode
from moe_lora.schedules.annealing import Annealing

Trainable = Literal["all", "experts", "router"]


@dataclass(frozen=True)
class Setting:
    """Settings of one training step; `None` leaves a setting unchanged.

    Attributes:
        phase: index of the phase.
        mode: routing mode, "routed" or "uniform".
        temperature: temperature of the router, > 0.
        loss_weights: weights by loss component, > 0; disabled components are absent.
        train: trained parameters, "all", "experts" or "router".
    """

    phase: int
    mode: RoutingMode | None
    temperature: float | None
    loss_weights: Mapping[str, float] | None
    train: Trainable


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Define one phase of a training schedule.

    A setting that is `None` keeps the value of the previous phase or, in the first phase, the
    current value of the model.

    Args:
        steps: length of the phase in optimizer steps, >= 1; `None` for an unlimited last phase.
        mode: "routed" or "uniform". By default `losses`, if given, determine the mode: "routed" if
            they include a specialized loss, else "uniform".
        losses: weights of `RemovalLoss` by component ("base", "boundary", "consistency", "detail"),
            >= 0; absent components are disabled.
        warmup_steps: number of steps in which the weights of the specialized losses increase
            linearly from those of the previous phase (0 in the first phase) to `losses`.
        temperature: temperature of the router, > 0, or an `Annealing` that starts with the phase.
        train: "all"; "experts" freezes the router; "router" freezes the experts.

    Raises:
        ValueError: if an argument is outside its range, or would have no effect.

    Example:
        >>> Phase(steps=500, losses={"base": 1.0}).routing_mode()
        'uniform'
    """

    steps: int | None = None
    mode: RoutingMode | None = None
    losses: Mapping[str, float] | None = None
    warmup_steps: int = 0
    temperature: float | Annealing | None = None
    train: Trainable = "all"

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"Expected `steps` to be >= 1 or None, but got {self.steps}.")
        for name, kind in (("mode", RoutingMode), ("train", Trainable)):
            value = getattr(self, name)
            if value not in get_args(kind) and not (name == "mode" and value is None):
                raise ValueError(
                    f"Expected `{name}` to be one of {list(get_args(kind))}, but got {value!r}."
                )
        if isinstance(self.temperature, float | int) and not self.temperature > 0:
            raise ValueError(f"Expected `temperature` to be > 0, but got {self.temperature}.")
        self._check_losses()

    def _check_losses(self) -> None:
        longest = math.inf if self.steps is None else self.steps
        if not 0 <= self.warmup_steps <= longest:
            raise ValueError(
                f"Expected `warmup_steps` to be in [0, steps={self.steps}], but got "
                f"{self.warmup_steps}."
            )
        if self.losses is None:
            if self.warmup_steps:
                raise ValueError("Expected `losses` to be given with `warmup_steps`, but got None.")
            return
        for name, weight in self.losses.items():
            if name not in LOSS_COMPONENTS:
                raise ValueError(
                    f"Expected `losses` to contain components of {list(LOSS_COMPONENTS)}, but got "
                    f"{name!r}."
                )
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(
                    f"Expected the loss weight `{name}` to be finite and >= 0, but got {weight}."
                )
        if not any(self.losses.values()):
            raise ValueError("Expected at least one loss weight to be > 0, but got none.")

    def routing_mode(self) -> RoutingMode | None:
        """Return `mode` or, by default, the routing mode that follows from `losses`."""
        if self.mode is not None or self.losses is None:
            return self.mode
        return "routed" if any(self.losses.get(name) for name in SPECIALIZED_LOSSES) else "uniform"

    def temperature_at(self, step: int) -> float | None:
        """Return the temperature at a step counted from the start of the phase."""
        return (
            self.temperature(step) if isinstance(self.temperature, Annealing) else self.temperature
        )

    def losses_at(self, step: int, previous: Mapping[str, float] | None) -> dict[str, float] | None:
        """Return the loss weights at a step counted from the start of the phase.

        Args:
            step: step within the phase, >= 0.
            previous: loss weights of the previous phase, if any.
        """
        target = previous if self.losses is None else self.losses
        if target is None:
            return None
        share = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        weights = {name: target.get(name, 0.0) for name in LOSS_COMPONENTS}
        for name in SPECIALIZED_LOSSES:
            start = 0.0 if previous is None else previous.get(name, 0.0)
            weights[name] = start + (weights[name] - start) * share
        return {name: float(weight) for name, weight in weights.items() if weight}
