"""The usual ways to train the mixture for object removal, by name."""

from __future__ import annotations

from collections.abc import Mapping

from moe_lora.schedules.phases import LOSSES, Phase
from moe_lora.schedules.schedule import Schedule

ALL_LOSSES = {"base": 1.0, "boundary": 0.3, "consistency": 0.5, "detail": 0.2}
EDGE_FOCUS = {"base": 1.0, "boundary": 0.8}
FOUNDATION_STEPS = 1000

STRATEGIES = {
    "A": "expert differentiation: all four losses, routed",
    "B": "baseline: base loss, uniform weights",
    "C": "custom specialisation: base and boundary loss, or any `losses`, routed",
    "1": "progressive: as B for `foundation_steps`, then as A",
    "2": "direct: as A",
    "3": "conservative: as B",
}
"""What `strategy` knows: losses A to C, and training 1 to 3."""


def strategy(
    name: str,
    *,
    losses: Mapping[str, float] | None = None,
    foundation_steps: int | None = None,
) -> Schedule:
    """Return the schedule of a named strategy; `STRATEGIES` lists them.

    Args:
        name: "A", "B", "C", "1", "2" or "3".
        losses: weights by component instead of the strategy's own (the specialised phase's of "1"),
            with a specialised one among them; not for "B" and "3".
        foundation_steps: of "1": how long weights are uniform; 1000 by default, 500 to 1000 is
            usual.

    Raises:
        ValueError: for another name, or an argument that the strategy does not use.

    Example:
        >>> schedule = strategy("1", foundation_steps=500)
        >>> [schedule.at(step).mode for step in (0, 499, 500)]
        ['uniform', 'uniform', 'routed']
    """
    if name not in STRATEGIES:
        raise ValueError(f"Expected `name` to be one of {list(STRATEGIES)}, but got {name!r}.")
    if foundation_steps is not None and name != "1":
        raise ValueError(
            f'Expected `foundation_steps` with strategy "1" only, but got it with {name!r}.'
        )
    uniform = Phase(mode="uniform", losses={"base": 1.0})
    if name in ("B", "3"):
        if losses is not None:
            raise ValueError(
                f"Expected no `losses` with strategy {name!r}, which trains by the base loss."
            )
        return Schedule([uniform])
    wanted = losses if losses is not None else EDGE_FOCUS if name == "C" else ALL_LOSSES
    if not any(wanted.get(component) for component in LOSSES[1:]):
        raise ValueError(
            f"Expected a specialised loss among `losses`, one of {list(LOSSES[1:])}, but got "
            f"{dict(wanted)}."
        )
    routed = Phase(mode="routed", losses=dict(wanted))
    if name != "1":
        return Schedule([routed])
    steps = FOUNDATION_STEPS if foundation_steps is None else foundation_steps
    base = wanted.get("base", 0.0) or 1.0
    return Schedule([Phase(steps=steps, mode="uniform", losses={"base": base}), routed])
