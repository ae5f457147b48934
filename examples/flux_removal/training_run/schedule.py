"""The course of a run: phases, warm-up of losses, temperature."""

from __future__ import annotations

from typing import Literal

from moe_lora.schedules import Annealing, Phase, Schedule
from options.train_options import TrainOptions
from training_run.losses import enabled_losses


def build_schedule(options: TrainOptions) -> Schedule:
    """Return what changes in the course of the run: phases, warm-up and temperature."""
    enabled = enabled_losses(options)
    mode: Literal["routed", "uniform"] = "routed" if options.routed else "uniform"
    warmup = options.specialized_warmup_steps
    temperature: float | Annealing | None = None
    if options.final_temperature is not None:
        temperature = options.routing_temperature
    phases = []
    if options.uniform_steps:
        foundation = {"base": enabled["base"]}
        phases.append(Phase(steps=options.uniform_steps, mode="uniform", losses=foundation))
    if options.router_phase_steps:
        part = Phase(
            steps=options.router_phase_steps,
            mode=mode,
            losses=enabled,
            warmup_steps=warmup,
            temperature=temperature,
            train="router" if options.router_phase == "alone" else "experts",
        )
        phases.append(part)
        warmup = 0
    if options.final_temperature is not None:
        assert options.temperature_steps is not None  # `check_course` wants both
        temperature = Annealing(
            options.routing_temperature,
            options.final_temperature,
            options.temperature_steps,
            options.temperature_course,
        )
    return Schedule(
        [*phases, Phase(mode=mode, losses=enabled, warmup_steps=warmup, temperature=temperature)]
    )
