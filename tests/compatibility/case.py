"""What the table of switches says of one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from compatibility.stage import Stage
from torch import nn

from moe_lora import MoELoraLinear

Works = Literal["yes", "raises", "not for mixtures"]
ALL = {"mix": 1.0, "turbo": 1.0, "style": 1.0}


@dataclass(frozen=True)
class Case:
    """Say whether a switch works beside a mixture, and show it.

    Attributes:
        library: "diffusers" or "PEFT".
        switch: its name, as users write it.
        works: "yes"; "raises" a clear error; "not for mixtures", where it leaves them alone.
        note: what a user should know; of what raises, the error.
        show: raises unless all of it is so.
    """

    library: Literal["diffusers", "PEFT"]
    switch: str
    works: Works
    note: str
    show: Callable[[Stage], None]


def case(
    library: Literal["diffusers", "PEFT"], switch: str, works: Works = "yes", note: str = ""
) -> Callable[[Callable[[Stage], None]], Case]:
    """Make a case of the function that shows it."""
    return lambda show: Case(library, switch, works, note, show)


def trainable(model: nn.Module) -> set[str]:
    return {
        name.partition("moe_lora_experts.")[2].partition(".")[0]
        or name.partition("moe_lora_routers.")[2].partition(".")[0] + " router"
        for name, p in model.named_parameters()
        if p.requires_grad and "moe_lora_" in name
    }


def layers(model: nn.Module) -> list[MoELoraLinear]:
    return [module for module in model.modules() if isinstance(module, MoELoraLinear)]
