"""Training settings as a function of the optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from moe_lora.losses import RemovalLoss
from moe_lora.routing.control import set_routing_mode
from moe_lora.routing.state import RoutingMode
from moe_lora.schedules.model_settings import set_routing_temperature, set_trainable
from moe_lora.schedules.phases import Phase, Setting


class Schedule:
    """Set the routing mode, temperature, loss weights and trained parameters phase by phase.

    Call `apply` once per optimizer step, before the forward pass. The settings depend on the step
    only: a schedule has no state to save, and resuming at step n continues exactly.

    Args:
        phases: phases in order; only the last may have `steps=None`. The last phase continues
            beyond its `steps`.

    Raises:
        ValueError: if there is no phase, if a phase before the last has no `steps`, or if a phase
            with uniform routing weights trains the router only.

    Example:
        >>> schedule = Schedule(
        ...     [
        ...         Phase(steps=500, losses={"base": 1.0}),
        ...         Phase(losses={"base": 1.0, "detail": 0.2}, warmup_steps=100),
        ...     ]
        ... )
        >>> schedule.at(499).mode, dict(schedule.at(499).loss_weights)
        ('uniform', {'base': 1.0})
        >>> schedule.at(549).mode, dict(schedule.at(549).loss_weights)
        ('routed', {'base': 1.0, 'detail': 0.1})
    """

    def __init__(self, phases: Iterable[Phase]) -> None:
        self.phases = tuple(phases)
        if not self.phases:
            raise ValueError("Expected at least one phase, but got none.")
        mode: RoutingMode | None = None
        for index, phase in enumerate(self.phases):
            if phase.steps is None and index < len(self.phases) - 1:
                raise ValueError(
                    f"Expected only the last phase to have no `steps`, but phase {index} of "
                    f"{len(self.phases)} has none."
                )
            mode = phase.routing_mode() or mode
            if mode == "uniform" and phase.train == "router":
                raise ValueError(
                    f'Expected mode "routed" in phase {index}, which trains the router only, but '
                    'got "uniform", which does not use the router.'
                )

    def at(self, step: int) -> Setting:
        """Return the settings of a step.

        Args:
            step: number of completed optimizer steps, >= 0.

        Returns:
            The settings.

        Raises:
            ValueError: if the step is negative.
        """
        if step < 0:
            raise ValueError(f"Expected `step` to be >= 0, but got {step}.")
        mode: RoutingMode | None = None
        temperature: float | None = None
        losses: Mapping[str, float] | None = None
        for index, phase in enumerate(self.phases):
            mode = phase.routing_mode() or mode
            is_last = index == len(self.phases) - 1
            if is_last or phase.steps is None or step < phase.steps:
                break
            temperature = phase.temperature_at(phase.steps) or temperature
            losses = phase.losses if phase.losses is not None else losses
            step -= phase.steps
        return Setting(
            phase=index,
            mode=mode,
            temperature=phase.temperature_at(step) or temperature,
            loss_weights=phase.losses_at(step, losses),
            train=phase.train,
        )

    def apply(self, model: nn.Module | None, losses: RemovalLoss | None, step: int) -> Setting:
        """Apply the settings of a step to a model and its loss.

        Args:
            model: the adapted model, or a wrapper around it; `None` to change the loss only.
            losses: loss that receives the loss weights of the schedule, if any; the weights of
                specialized losses are multiplied by its `specialized_every`. `None` for a training
                loop that reads `Setting.loss_weights` itself.
            step: number of completed optimizer steps, >= 0; equal for all batches of one gradient
                accumulation.

        Returns:
            The settings of the step.

        Raises:
            ValueError: if the step is negative, if the model has no adapter, or if it has no router
                but the settings need one.
        """
        setting = self.at(step)
        if losses is not None and setting.loss_weights is not None:
            losses.weights = {
                name: weight * (1 if name == "base" else losses.specialized_every)
                for name, weight in setting.loss_weights.items()
            }
        if model is None:
            return setting
        if setting.mode is not None:
            set_routing_mode(model, setting.mode)
        if setting.temperature is not None:
            set_routing_temperature(model, setting.temperature)
        set_trainable(model, setting.train)
        return setting

    def __repr__(self) -> str:
        return f"Schedule({list(self.phases)})"
