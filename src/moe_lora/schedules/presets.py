"""Named schedules for object removal."""

from __future__ import annotations

from collections.abc import Mapping

from moe_lora.losses import RemovalLoss
from moe_lora.losses.expert_table import SPECIALIZED_LOSSES
from moe_lora.schedules.phases import Phase
from moe_lora.schedules.schedule import Schedule

EDGE_FOCUS = {"base": 1.0, "boundary": 0.8}
FOUNDATION_STEPS = 1000

PRESETS = {
    "A": "expert differentiation: all four losses, routed",
    "B": "baseline: base loss, uniform routing weights",
    "C": "custom specialization: base and boundary loss, or any `losses`, routed",
    "1": "progressive: B for `foundation_steps`, then A",
    "2": "direct: same as A",
    "3": "conservative: same as B",
}
"""Description of every preset: loss configurations A to C, training strategies 1 to 3."""


def preset(
    name: str,
    *,
    losses: Mapping[str, float] | None = None,
    foundation_steps: int | None = None,
) -> Schedule:
    """Build the schedule of a preset; see `PRESETS`.

    Args:
        name: "A", "B", "C", "1", "2" or "3".
        losses: weights by component that replace those of the preset (in "1", those of the second
            phase), including a specialized loss; not available for "B" and "3".
        foundation_steps: number of steps with uniform routing weights in "1"; typically 500 to
            1000, 1000 by default.

    Returns:
        The schedule.

    Raises:
        ValueError: if the name is unknown, or the preset does not use an argument.

    Example:
        >>> schedule = preset("1", foundation_steps=500)
        >>> [schedule.at(step).mode for step in (0, 499, 500)]
        ['uniform', 'uniform', 'routed']
    """
    if name not in PRESETS:
        raise ValueError(f"Expected `name` to be one of {list(PRESETS)}, but got {name!r}.")
    if foundation_steps is not None and name != "1":
        raise ValueError(
            f"Expected `foundation_steps` to be None for preset {name!r}, which has one phase, "
            f"but got {foundation_steps}."
        )
    uniform = Phase(mode="uniform", losses={"base": 1.0})
    if name in ("B", "3"):
        if losses is not None:
            raise ValueError(
                f"Expected `losses` to be None for preset {name!r}, which has the base loss only, "
                f"but got {dict(losses)}."
            )
        return Schedule([uniform])
    weights = losses if losses is not None else EDGE_FOCUS if name == "C" else RemovalLoss().weights
    if not any(weights.get(component) for component in SPECIALIZED_LOSSES):
        raise ValueError(
            f"Expected `losses` to include one of {list(SPECIALIZED_LOSSES)}, but got "
            f"{dict(weights)}."
        )
    routed = Phase(mode="routed", losses=dict(weights))
    if name != "1":
        return Schedule([routed])
    steps = FOUNDATION_STEPS if foundation_steps is None else foundation_steps
    base = weights.get("base", 0.0) or 1.0
    return Schedule([Phase(steps=steps, mode="uniform", losses={"base": base}), routed])
