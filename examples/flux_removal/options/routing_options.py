"""The options of `train.py` against a collapsing router, and for what changes during a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from options.train_options import TrainOptions


def option(default: Any, text: str) -> Any:
    """Return a dataclass field with a default and a help text."""
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class BalanceOptions:
    """Keep every expert in use, and different from the others."""

    load_balancing_weight: float = option(0.0, "Weight of the load balancing loss.")
    router_z_weight: float = option(
        0.0, "Weight of the router z-loss, which penalizes large logits."
    )
    entropy_floor_weight: float = option(0.0, "Weight of the entropy floor loss.")
    entropy_floor: float = option(
        0.5, "Mean entropy of the routing weights below which the loss is positive, in (0, 1)."
    )
    expert_dropout: float = option(0.0, "Probability of removing an expert from a training sample.")
    orthogonality_weight: float = option(
        0.0, "Weight of the orthogonality loss, which penalizes similar experts."
    )


@dataclass(kw_only=True)
class CourseOptions:
    """Say what changes in the course of a run."""

    uniform_steps: int = option(
        0, "Steps of phase 1, with the base loss and uniform routing weights."
    )
    specialized_warmup_steps: int = option(
        0, "Steps after phase 1 with linearly increasing weights of the specialized losses."
    )
    router_phase: Literal["none", "frozen", "alone"] = option(
        "none", "Train after phase 1 with a frozen router, or the router alone."
    )
    router_phase_steps: int = option(0, "Steps of router_phase.")
    final_temperature: float | None = option(None, "Final value of the routing temperature.")
    temperature_steps: int | None = option(
        None, "Steps from routing_temperature to final_temperature, after phase 1 and router_phase."
    )
    temperature_course: Literal["linear", "cosine", "exponential"] = option(
        "cosine", "Interpolation of the temperature."
    )


def check_balance(options: TrainOptions) -> None:
    """Raise for remedies against collapse that are out of range or have no effect."""
    routed = ("load_balancing_weight", "router_z_weight", "entropy_floor_weight", "expert_dropout")
    for name in routed:
        if getattr(options, name) and not options.routed:
            raise ValueError(
                f"Expected a routed run with `{name}`: LoRA experts, more than one of them, "
                "and a boundary, consistency or detail loss or `routing` always."
            )
    if options.orthogonality_weight and not (options.mixed and options.num_experts > 1):
        raise ValueError(
            "Expected LoRA experts, more than one of them, with `orthogonality_weight`."
        )
    if not options.entropy_floor_weight:
        if options.entropy_floor != BalanceOptions.entropy_floor:
            raise ValueError("Expected `entropy_floor_weight` together with `entropy_floor`.")
        return
    kept = {"soft": options.num_experts, "topk": options.top_k, "hard": 1}
    highest = math.log(kept[options.routing_strategy] or 1) / math.log(options.num_experts)
    if not 0 < options.entropy_floor < highest:
        raise ValueError(
            f"Expected `entropy_floor` to be in (0, {highest:.2f}), where weights of the strategy "
            f"{options.routing_strategy} can be, but got {options.entropy_floor}."
        )


def check_course(options: TrainOptions) -> None:
    """Raise for changes in the course of a run that cannot be made."""
    if options.specialized_warmup_steps and not options.specialized:
        raise ValueError(
            "Expected a boundary, consistency or detail loss with `specialized_warmup_steps`."
        )
    if (options.router_phase == "none") != (options.router_phase_steps == 0):
        raise ValueError(
            "Expected `router_phase` and `router_phase_steps` together, but got "
            f"{options.router_phase} and {options.router_phase_steps}."
        )
    if (options.final_temperature is None) != (options.temperature_steps is None):
        raise ValueError(
            "Expected `final_temperature` and `temperature_steps` together, but got "
            f"{options.final_temperature} and {options.temperature_steps}."
        )
    if (
        options.final_temperature is None
        and options.temperature_course != CourseOptions.temperature_course
    ):
        raise ValueError("Expected `final_temperature` together with `temperature_course`.")
    for name, off in (("router_phase", "none"), ("final_temperature", None)):
        if getattr(options, name) != off and not options.routed:
            raise ValueError(f"Expected a routed run with `{name}`.")
    if options.uniform_steps and not (
        (options.specialized or options.routing == "always") and options.enable_base_loss
    ):
        raise ValueError(
            f"Expected the base loss and a specialized loss, or `routing` always, with "
            f"`uniform_steps` {options.uniform_steps}: phase 1 has the base loss and uniform "
            "weights, phase 2 has more."
        )
