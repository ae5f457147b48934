"""The options of `train.py` for several kinds of removal, each with an expert of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from options.routing_options import option

if TYPE_CHECKING:
    from options.train_options import TrainOptions

HintForm = Literal["only", "focus"]


@dataclass(kw_only=True)
class KindOptions:
    """Name the experts, and say which one a kind of sample is for."""

    expert_names: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of the experts, as many as num_experts; by default those of the library."
        },
    )
    kind_experts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Experts by kind of sample, as KIND=EXPERT, or KIND for an expert of this "
            "name; the kind of a sample is its task hint."
        },
    )
    kind_hint: Literal["only", "focus"] = option(
        "only", "Task hint of a kind: its expert alone, or focus for more weight."
    )
    hint_dropout: float = option(0.0, "Share of the training samples without their task hint.")
    router_supervision_weight: float = option(
        0.0, "Weight of the loss that teaches the router the expert of each kind."
    )


def read_kind_experts(entries: Sequence[str]) -> dict[str, str]:
    """Return experts by kind.

    Args:
        entries: `KIND=EXPERT`, or `KIND` for an expert of the same name.

    Raises:
        ValueError: for an entry without one of its parts, or two for one kind.

    Example:
        >>> read_kind_experts(["shadow=removal_expert", "glow"])
        {'shadow': 'removal_expert', 'glow': 'glow'}
    """
    found: dict[str, str] = {}
    for entry in entries:
        kind, given, expert = entry.partition("=")
        if not kind or (given and not expert):
            raise ValueError(f"Expected `kind_experts` as KIND=EXPERT or KIND, but got {entry!r}.")
        if kind in found:
            raise ValueError(f"Expected one expert for the kind {kind!r}, but got two.")
        found[kind] = expert or kind
    return found


def check_kinds(options: TrainOptions) -> None:
    """Raise for names of experts and hints that the run cannot honor; set the number of experts."""
    names = options.expert_names
    if names:
        default = type(options).__dataclass_fields__["num_experts"].default
        if not options.mixed:
            raise ValueError("Expected a mixture with `expert_names`, but the run trains none.")
        if options.num_experts not in (default, len(names)):
            raise ValueError(
                f"Expected `num_experts` to be the number of `expert_names`, {len(names)}, but got "
                f"{options.num_experts}."
            )
        options.num_experts = len(names)
    experts = read_kind_experts(options.kind_experts)
    if not experts:
        for name in ("kind_hint", "hint_dropout", "router_supervision_weight"):
            if getattr(options, name) != KindOptions.__dataclass_fields__[name].default:
                raise ValueError(f"Expected `kind_experts` together with `{name}`.")
        return
    if not options.routed:
        raise ValueError(
            "Expected a routed run with `kind_experts`: LoRA experts, more than one of them, and a "
            "boundary, consistency or detail loss or `routing` always."
        )
    unknown = sorted(set(experts.values()) - set(options.experts))
    if unknown:
        raise ValueError(
            f"Expected `kind_experts` to name experts of {list(options.experts)}, but got "
            f"{unknown}."
        )
    if options.task_hint:
        raise ValueError("Expected either `task_hint` or `kind_experts`, but got both.")
    if options.streamed:
        raise ValueError("Expected no data in shards with `kind_experts`: they name no kinds.")
    if options.router_supervision_weight and options.router == "uniform":
        raise ValueError(
            "Expected a router that learns with `router_supervision_weight`, for example "
            "surroundings, but got uniform."
        )
    if not 0 <= options.hint_dropout < 1:
        raise ValueError(
            f"Expected `hint_dropout` to be in [0, 1), but got {options.hint_dropout}."
        )
