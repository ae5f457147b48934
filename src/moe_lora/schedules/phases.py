"""The phases of a training run, and what holds at one of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from moe_lora.routing.state import RoutingMode
from moe_lora.schedules.annealing import Annealing

LOSSES = ("base", "boundary", "consistency", "detail")
"""The components of `RemovalLoss`; all but the first are the specialised ones."""

Trainable = Literal["all", "experts", "router"]


@dataclass(frozen=True)
class Setting:
    """Say what holds at one step; `None` is what a schedule leaves as it finds it.

    Attributes:
        phase: the index of the phase.
        mode: "routed" or "uniform".
        temperature: of the router.
        loss_weights: by component; those that are off are left out.
        train: "all", "experts" or "router".
    """

    phase: int
    mode: RoutingMode | None
    temperature: float | None
    loss_weights: Mapping[str, float] | None
    train: Trainable


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Describe a stretch of training.

    What is `None` stays as the phase before had it, or, in the first phase, as it is.

    Args:
        steps: how long the phase is, >= 1; `None` for the last one, which does not end.
        mode: "routed" or "uniform"; where `losses` are given, routed if a specialised one is among
            them, unless this says otherwise.
        losses: weights of `RemovalLoss` by component ("base", "boundary", "consistency", "detail"),
            >= 0; what is left out is off.
        warmup_steps: in so many steps the specialised weights move linearly from those of the phase
            before (0 in the first) to `losses`, which hold from the last of these steps on.
        temperature: of the router, > 0, or an `Annealing` that counts from the phase's start.
        train: "all"; or "experts" alone, the router being frozen; or the "router" alone.

    Raises:
        ValueError: for values outside these ranges, or an option that would have no effect.
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
            if name not in LOSSES:
                raise ValueError(f"Expected `losses` among {list(LOSSES)}, but got {name!r}.")
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(
                    f"Expected the loss weight `{name}` to be finite and >= 0, but got {weight}."
                )
        if not any(self.losses.values()):
            raise ValueError("Expected at least one loss weight to be > 0, but all are off.")

    def wanted_mode(self) -> RoutingMode | None:
        """Return the mode that the phase asks for, by itself or by its losses."""
        if self.mode is not None or self.losses is None:
            return self.mode
        return "routed" if any(self.losses.get(name) for name in LOSSES[1:]) else "uniform"

    def temperature_at(self, step: int) -> float | None:
        """Return the temperature that the phase asks for, `step` steps after its start."""
        return (
            self.temperature(step) if isinstance(self.temperature, Annealing) else self.temperature
        )

    def losses_at(self, step: int, before: Mapping[str, float] | None) -> dict[str, float] | None:
        """Return the loss weights, `step` steps after the phase's start.

        Args:
            step: >= 0.
            before: the weights of the phase before; `None` where there are none.
        """
        wanted = before if self.losses is None else self.losses
        if wanted is None:
            return None
        share = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        weights = {name: wanted.get(name, 0.0) for name in LOSSES}
        for name in LOSSES[1:]:
            start = 0.0 if before is None else before.get(name, 0.0)
            weights[name] = start + (weights[name] - start) * share
        return {name: float(weight) for name, weight in weights.items() if weight}
