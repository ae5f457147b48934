"""Temperature annealing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Curve = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Annealing:
    """Anneal a temperature from `start` to `end` over `steps` steps.

    With t = min(step / steps, 1):

    - linear: start + (end − start) · t
    - cosine: end + (start − end) · (1 + cos πt) / 2
    - exponential: start · (end / start)^t

    Args:
        start: value at step 0, > 0.
        end: value from step `steps` on, > 0.
        steps: number of steps, >= 1.
        curve: "linear", "cosine" or "exponential".

    Raises:
        ValueError: if an argument is outside its range.

    Example:
        >>> [Annealing(4.0, 1.0, 2, "exponential")(step) for step in (0, 1, 2, 3)]
        [4.0, 2.0, 1.0, 1.0]
    """

    start: float
    end: float
    steps: int
    curve: Curve = "cosine"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Expected `{name}` to be finite and > 0, but got {value}.")
        if self.steps < 1:
            raise ValueError(f"Expected `steps` to be >= 1, but got {self.steps}.")
        if self.curve not in get_args(Curve):
            raise ValueError(
                f"Expected `curve` to be one of {list(get_args(Curve))}, but got {self.curve!r}."
            )

    def __call__(self, step: int) -> float:
        """Return the temperature at `step`, >= 0."""
        if step >= self.steps:
            return self.end
        t = step / self.steps
        if self.curve == "linear":
            return self.start + (self.end - self.start) * t
        if self.curve == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2
        return float(self.start * (self.end / self.start) ** t)
