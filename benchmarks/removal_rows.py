"""What `removal.py` compares: the rows of its table, and the options of `train.py` for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import moe_lora
from train import parse_options

DEFAULTS = vars(parse_options(["--train_data_dir", "unused"]))
"""The options of `train.py`."""

SPECIALIZED = ("boundary", "consistency", "detail")
OF_A_ROUTER = (
    *("router", "router_kwargs", "routing_temperature", "routing_strategy", "top_k", "task_hint"),
    *("load_balancing_weight", "router_z_weight", "router_learning_rate"),
)


@dataclass(frozen=True)
class Row:
    """Describe a row.

    Args:
        title: how the report calls it.
        flags: options of `train.py`, on top of those that all rows share.
        plain: PEFT's LoRA, of the rank of all experts together.
        scale: for a plain one, its lora_alpha / r over that of an expert; "share" for 1/E, which is
            the scale that uniform weights give to a mixture.
        rate: its learning rate over the one that is given. Weights below 1 make the experts' steps
            small: each kind of row learned best at its own rate.
        needs_losses: without the specialized losses it is another row's double.
        optional: run only when it is asked for.
    """

    title: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False
    scale: float | str = 1.0
    rate: float = 1.0
    needs_losses: bool = False
    optional: bool = False


ROUTED = {"routing": "always"}
BY_TOKEN = ROUTED | {"router": "token_removal"}
SIGNALS = {"expert_signals": True}
MIXTURE_RATE = 2.0

ROWS: dict[str, Row] = {
    "plain": Row("plain LoRA", plain=True),
    "plain_share": Row(
        "plain LoRA at 1/E", plain=True, scale="share", rate=MIXTURE_RATE, optional=True
    ),
    "uniform": Row("mixture uniform", {"routing": "never"}, rate=MIXTURE_RATE),
    "routed": Row("mixture routed", ROUTED, rate=MIXTURE_RATE),
    "signals": Row("routed, signals", ROUTED | SIGNALS, rate=MIXTURE_RATE, needs_losses=True),
    "tokens": Row("routed by token", BY_TOKEN, rate=MIXTURE_RATE),
    "token_signals": Row(
        "by token, signals", BY_TOKEN | SIGNALS, rate=MIXTURE_RATE, needs_losses=True
    ),
}


def missing(row: Row) -> str | None:
    """Return what this version lacks for a row, `None` where it lacks nothing."""
    for name, value in row.flags.items():
        if name not in DEFAULTS:
            return f"the option `{name}` of train.py"
        if name == "router" and value not in moe_lora.routing.router_names():
            return f"the router {value!r}; it has {list(moe_lora.routing.router_names())}"
    return None


def available() -> list[str]:
    """Return the names of the rows that are run when none is named."""
    return [name for name, row in ROWS.items() if not row.optional and missing(row) is None]


def variants(names: list[str], losses: list[bool]) -> list[tuple[str, bool]]:
    """Return the pairs of row and losses to run; rows that need the losses are left out without.

    Raises:
        ValueError: for an unknown row, or one that needs what this version lacks.
    """
    for name in names:
        if name not in ROWS:
            raise ValueError(f"Expected `rows` to be among {list(ROWS)}, but got {name!r}.")
        lacking = missing(ROWS[name])
        if lacking is not None:
            raise ValueError(f"Row {name!r} needs what this moe_lora lacks: {lacking}.")
    return [(n, with_) for n in names for with_ in losses if with_ or not ROWS[n].needs_losses]


def read_base(config: Path, changes: list[str], steps: int | None) -> dict[str, Any]:
    """Return the options that all rows share.

    Args:
        config: YAML file of `train.py`.
        changes: `name=value`, which win over the file.
        steps: of training; phases and warm-up then keep their share of it. `None` for the file's.

    Raises:
        ValueError: for a change that is none, or where nothing says how many steps to train.
    """
    base: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8")) or {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in DEFAULTS:
            raise ValueError(
                f"Expected OPTION=VALUE with an option of train.py, but got {change!r}."
            )
        base[name] = yaml.safe_load(value)
    whole = base.get("max_train_steps")
    if whole is None and steps is None:
        raise ValueError(f"Expected `max_train_steps` in {config}, or --steps.")
    if steps is not None:
        for name in ("uniform_steps", "lr_warmup_steps"):
            if whole and base.get(name):
                base[name] = round(base[name] * steps / whole)
        base["max_train_steps"] = steps
    return base


def options_of(row: Row, losses: bool, seed: int, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of one run, as a YAML file of `train.py` holds them."""
    entries = {**base, **row.flags, "seed": seed}
    for name in SPECIALIZED:
        entries[f"enable_{name}_loss"] = losses
        if not losses:
            entries.pop(f"{name}_loss_weight", None)
    entries["enable_mask_info"] = losses
    if row.rate != 1:
        # YAML reads 1e-3 as a string.
        given = float(entries.get("learning_rate", DEFAULTS["learning_rate"]))
        entries["learning_rate"] = given * row.rate
    routed = entries.get("routing") == "always"
    if not routed:
        entries = {name: value for name, value in entries.items() if name not in OF_A_ROUTER}
    if not (routed or losses):
        entries.pop("uniform_steps", None)
    return plain_options(row, entries) if row.plain else entries


def plain_options(row: Row, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the options of a mixture into those of PEFT's LoRA of the same size."""
    given = DEFAULTS | dict(entries)
    experts = given["num_experts"]
    rank = experts * given["lora_r"]
    scale = given["lora_alpha"] * experts
    share = 1 / experts if row.scale == "share" else float(row.scale)
    kept = {name: value for name, value in entries.items() if name != "num_experts"}
    return kept | {"adapter": "lora", "lora_r": rank, "lora_alpha": scale * share}
