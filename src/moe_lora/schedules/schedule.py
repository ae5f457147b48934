"""The course of a training run as a function of the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from moe_lora.losses import RemovalLoss
from moe_lora.routing.control import set_routing_mode
from moe_lora.routing.state import RoutingMode
from moe_lora.schedules.model_settings import set_routing_temperature, set_trainable
from moe_lora.schedules.phases import Phase, Setting


class Schedule:
    """Set routing mode, temperature, loss weights and what is trained, phase by phase.

    A loop calls `apply` once per step, before the forward pass. What holds at a step follows from
    the step alone: there is nothing to save, and a run that goes on at step n goes on exactly.

    Args:
        phases: in order; only the last may have no `steps`, and it goes on after its end, too.

    Raises:
        ValueError: without phases, for a phase without `steps` before another, or a phase that
            trains only the router while no router is asked.

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
            mode = phase.wanted_mode() or mode
            if mode == "uniform" and phase.train == "router":
                raise ValueError(
                    f'Expected mode "routed" in phase {index}, which trains only the router, but '
                    'got "uniform", in which no router is asked.'
                )

    def at(self, step: int) -> Setting:
        """Return what holds at a step.

        Args:
            step: optimizer steps done before it, >= 0.

        Raises:
            ValueError: for a negative step.
        """
        if step < 0:
            raise ValueError(f"Expected `step` to be >= 0, but got {step}.")
        mode: RoutingMode | None = None
        temperature: float | None = None
        losses: Mapping[str, float] | None = None
        for index, phase in enumerate(self.phases):
            mode = phase.wanted_mode() or mode
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
        """Bring a model and its loss to what holds at a step.

        Args:
            model: the adapted model, or a wrapper around it; `None` for one that has no experts,
                where only the loss changes.
            losses: whose `weights` are set where the schedule has loss weights, the specialised
                ones times its `specialised_every`; `None` for a loop that reads them off what is
                returned.
            step: optimizer steps done before it, >= 0; the same for all batches that accumulate
                gradients for one step.

        Returns:
            What holds now.

        Raises:
            ValueError: for a negative step, or when the model has no adapter, or no router where
                one is needed.
        """
        setting = self.at(step)
        if losses is not None and setting.loss_weights is not None:
            losses.weights = {
                name: weight * (1 if name == "base" else losses.specialised_every)
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
