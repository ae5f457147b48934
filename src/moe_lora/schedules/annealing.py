"""A temperature that moves from one value to another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Course = Literal["linear", "cosine", "exponential"]


@dataclass(frozen=True)
class Annealing:
    """Move a temperature from `start` to `end` within `steps` steps, and leave it there.

    With t = min(step / steps, 1):

    - linear: start + (end − start) · t
    - cosine: end + (start − end) · (1 + cos πt) / 2
    - exponential: start · (end / start)^t

    Args:
        start: the value at step 0, > 0.
        end: the value from step `steps` on, > 0.
        steps: >= 1.
        course: "linear", "cosine" or "exponential".

    Raises:
        ValueError: for values outside these ranges.

    Example:
        >>> [Annealing(4.0, 1.0, 2, "exponential")(step) for step in (0, 1, 2, 3)]
        [4.0, 2.0, 1.0, 1.0]
    """

    start: float
    end: float
    steps: int
    course: Course = "cosine"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Expected `{name}` to be finite and > 0, but got {value}.")
        if self.steps < 1:
            raise ValueError(f"Expected `steps` to be >= 1, but got {self.steps}.")
        if self.course not in get_args(Course):
            raise ValueError(
                f"Expected `course` to be one of {list(get_args(Course))}, but got {self.course!r}."
            )

    def __call__(self, step: int) -> float:
        """Return the value after `step` steps, >= 0."""
        if step >= self.steps:
            return self.end
        t = step / self.steps
        if self.course == "linear":
            return self.start + (self.end - self.start) * t
        if self.course == "cosine":
            return self.end + (self.start - self.end) * (1 + math.cos(math.pi * t)) / 2
        return float(self.start * (self.end / self.start) ** t)
