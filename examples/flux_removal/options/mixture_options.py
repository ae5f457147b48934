"""The options of `train.py` for experts and their router."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from moe_lora import MoELoraConfig
from options.composition_options import CompositionOptions
from options.kind_options import KindOptions
from options.routing_options import BalanceOptions, option

if TYPE_CHECKING:
    from options.train_options import TrainOptions

ATTENTION_AND_FEED_FORWARD = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("proj_mlp", "proj_out"),
)
"""What is adapted by default, in the names of diffusers' `FluxTransformer2DModel`."""

OF_THE_MIXTURE = (
    *("num_experts", "router", "routing", "router_kwargs"),
    *("routing_temperature", "routing_strategy", "top_k"),
)


@dataclass(kw_only=True)
class MixtureOptions(CompositionOptions, BalanceOptions, KindOptions):
    """Describe the experts and their router."""

    use_lora: bool = option(True, "Train LoRA experts; false trains the whole transformer.")
    adapter: Literal["moe_lora", "lora"] = option(
        "moe_lora",
        "A mixture of experts; lora for a plain LoRA of PEFT with rank lora_r, as a baseline.",
    )
    num_experts: int = option(3, "Experts per layer; 1 is a plain LoRA without a router.")
    lora_r: int = option(256, "Rank of each expert.")
    lora_alpha: float = option(256.0, "The scale of the experts is lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout probability on the input of the experts.")
    target_modules: list[str] = field(
        default_factory=lambda: list(ATTENTION_AND_FEED_FORWARD),
        metadata={"help": "Adapted layers: name endings, one regular expression, or all-linear."},
    )
    router: str = option("three_expert_removal", "Name of a registered router.")
    routing: Literal["by_losses", "always", "never"] = option(
        "by_losses", "Use the router with specialized losses only, always, or never."
    )
    router_kwargs: str = option("{}", "Constructor arguments of the router, as JSON.")
    routing_temperature: float = option(1.0, "Divisor of the router's logits, usually 0.5 to 2.")
    routing_strategy: Literal["soft", "hard", "topk"] = option(
        "soft", "Computation of the routing weights from the logits."
    )
    top_k: int | None = option(None, "Number of selected experts with the strategy topk.")
    task_hint: str | None = option(
        None, "Task hint for the router in training, for example removal_focus."
    )
    router_learning_rate: float | None = option(
        None, "Learning rate of the router; learning_rate by default."
    )

    @property
    def experts(self) -> tuple[str, ...]:
        """Return the names of the experts."""
        names = tuple(self.expert_names) or None
        return MoELoraConfig(num_experts=self.num_experts, expert_names=names).experts

    @property
    def targets(self) -> list[str] | str:
        """Return the layers to adapt as PEFT takes them: name endings, a regex, or all-linear."""
        names = self.target_modules
        is_rule = len(names) == 1 and not re.fullmatch(r"[\w.]+", names[0])
        return names[0] if is_rule else names


def check_mixture(options: TrainOptions) -> None:
    """Raise for options of a mixture or of a router that the run does not have."""
    if options.adapter == "lora":
        _check_plain(options)
    if options.routing != "by_losses" and not (options.mixed and options.num_experts > 1):
        raise ValueError(
            f"Expected LoRA experts, more than one of them, with `routing` {options.routing}."
        )
    if not isinstance(json.loads(options.router_kwargs), dict):
        raise ValueError(
            f"Expected `router_kwargs` to be a JSON object, but got {options.router_kwargs}."
        )
    if options.task_hint and not options.routed:
        raise ValueError(
            "Expected a routed run with `task_hint`: LoRA experts, more than one of them, "
            "and a boundary, consistency or detail loss or `routing` always."
        )
    if options.router_learning_rate is not None and not options.routed:
        raise ValueError("Expected a routed run with `router_learning_rate`.")


def _check_plain(options: TrainOptions) -> None:
    """Raise for options that PEFT's own LoRA does not have."""
    if not options.use_lora:
        raise ValueError("Expected `use_lora` with `adapter` lora, but it is off.")
    fields = MixtureOptions.__dataclass_fields__
    for name in OF_THE_MIXTURE:
        if getattr(options, name) != fields[name].default:
            raise ValueError(
                f"Expected no `{name}` with `adapter` lora, but got {getattr(options, name)}: "
                "it has no experts and no router."
            )
