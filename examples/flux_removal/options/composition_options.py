"""The options of `train.py` for experts from plain LoRA files."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lora import MoELoraConfig

if TYPE_CHECKING:
    from options.train_options import TrainOptions

OF_THE_FILES = ("lora_r", "lora_alpha", "target_modules")
OF_TRAINED_EXPERTS = ("uniform_steps", "router_phase_steps", "orthogonality_weight")


@dataclass(kw_only=True)
class CompositionOptions:
    """Build the experts of plain LoRA files, and say which of them are trained."""

    compose: list[str] | None = field(
        default=None,
        metadata={
            "help": "Experts from plain LoRA files, a list of NAME=PATH; the run is routed, by the "
            "router mask_aware by default, and trains the router alone."
        },
    )
    train_experts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of experts of compose to train, too; the others stay as in their files."
        },
    )

    @property
    def lora_files(self) -> dict[str, str]:
        """Return the path of the LoRA of every expert."""
        pairs = [entry.partition("=") for entry in self.compose or ()]
        return {name: path for name, _, path in pairs}


def resolve_composition(options: TrainOptions) -> None:
    """Set the number of experts, the routing and the router of a composed mixture.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for options that the run cannot honor.
    """
    if not options.compose:
        if options.train_experts:
            raise ValueError("Expected --compose together with `train_experts`.")
        return
    files, names = options.lora_files, list(options.lora_files)
    if len(names) < len(options.compose) or not all(n and p for n, p in files.items()):
        raise ValueError(
            f"Expected `compose` to be a list of NAME=PATH with distinct names, but got "
            f"{options.compose}."
        )
    if not options.mixed or len(names) < 2:
        raise ValueError(f"Expected a mixture of two or more experts with `compose`, got {names}.")
    missing = [path for path in files.values() if not Path(path).exists()]
    if missing:
        raise FileNotFoundError(f"Expected a LoRA at {missing[0]!r}, but there is none.")
    _check_trained(options, names)
    fields = type(options).__dataclass_fields__
    for name in OF_THE_FILES:
        factory = fields[name].default_factory
        usual = fields[name].default if factory is MISSING else factory()
        if getattr(options, name) != usual:
            raise ValueError(f"Expected no `{name}` with `compose`: it is that of the files.")
    if options.num_experts not in (fields["num_experts"].default, len(names)):
        raise ValueError(
            f"Expected `num_experts` to be that of `compose`, {len(names)}, but got "
            f"{options.num_experts}."
        )
    if options.plan:
        raise ValueError("Expected no `plan` with `compose`, whose files a plan does not read.")
    if options.expert_names not in ([], names):
        raise ValueError(
            f"Expected `expert_names` to be those of `compose`, {names}, but got "
            f"{options.expert_names}."
        )
    options.num_experts, options.expert_names = len(names), names
    if options.routing == "by_losses":
        options.routing = "always"
    # The rules of the default router are those of the three jobs in the names.
    if options.router == fields["router"].default and tuple(names) != MoELoraConfig().expert_names:
        options.router = "mask_aware"


def _check_trained(options: TrainOptions, names: list[str]) -> None:
    unknown = [name for name in options.train_experts or () if name not in names]
    if unknown:
        raise ValueError(f"Expected `train_experts` out of {names}, but got {unknown}.")
    if options.train_experts:
        return
    if options.routing == "never":
        raise ValueError("Expected `train_experts` with `routing` never: there is no router.")
    for name in (*OF_TRAINED_EXPERTS, "expert_signals"):
        if getattr(options, name):
            raise ValueError(f"Expected `train_experts` with `{name}`, which trains experts.")
