"""Validation of the fields of a config, from code or from a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, get_args

from moe_lora.routing.routers.gating import RoutingStrategy

MAX_RANK, MAX_EXPERTS = 65_536, 1_024
"""Upper limits far above useful values, so that no file makes its reader run out of memory."""


class Check(NamedTuple):
    """Check of a field's value.

    Attributes:
        allows: whether a value is allowed.
        expected: the allowed values in words, for the message.
    """

    allows: Callable[[Any], bool]
    expected: str

    def or_none(self) -> Check:
        """Return the check that also allows `None`."""
        return Check(lambda value: value is None or self.allows(value), f"{self.expected}, or None")


def is_integer(value: Any, low: int, high: int | None = None) -> bool:
    """Return whether a value is an integer (not a bool) in [low, high]."""
    fits = isinstance(value, int) and not isinstance(value, bool)
    return fits and low <= value and (high is None or value <= high)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number (not a bool)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def _integer(low: int, high: int | None = None) -> Check:
    bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
    return Check(lambda value: is_integer(value, low, high), f"an integer {bounds}")


def _one_of(*options: Any) -> Check:
    return Check(
        lambda value: any(type(value) is type(o) and value == o for o in options),
        f"one of {list(options)}",
    )


def _strings(value: Any, *kinds: type[Collection[Any]]) -> bool:
    return isinstance(value, kinds) and all(isinstance(entry, str) for entry in value)


def _pattern(check: Check) -> Check:
    def allows(value: Any) -> bool:
        return isinstance(value, dict) and all(
            isinstance(key, str) and check.allows(entry) for key, entry in value.items()
        )

    return Check(allows, f"a dict of layer names to {check.expected}")


def _is_json(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return False
    try:
        json.dumps(value)
    except (TypeError, ValueError):  # ValueError for a circular reference
        return False
    return True


_STRING = Check(lambda value: isinstance(value, str), "a string")
_BOOL = Check(lambda value: isinstance(value, bool), "True or False")
_NUMBER = Check(is_number, "a finite number")
_PROBABILITY = Check(lambda value: is_number(value) and 0 <= value < 1, "a number in [0, 1)")
_RANK = _integer(1, MAX_RANK)
_TARGETS = Check(
    lambda value: isinstance(value, str) or _strings(value, list, set, tuple),
    "a string or a list of strings",
)
_INDEX = Check(lambda value: is_integer(value, 0), "an integer >= 0")

CHECKS: Mapping[str, Check] = {
    # PEFT's own
    "task_type": _STRING.or_none(),
    "peft_type": _STRING.or_none(),
    "auto_mapping": Check(lambda value: isinstance(value, dict), "a dict").or_none(),
    "peft_version": _STRING.or_none(),
    "base_model_name_or_path": _STRING.or_none(),
    "revision": _STRING.or_none(),
    "inference_mode": _BOOL,
    # the experts
    "r": _RANK,
    "lora_alpha": _NUMBER,
    "lora_dropout": _PROBABILITY,
    "target_modules": _TARGETS.or_none(),
    "exclude_modules": _TARGETS.or_none(),
    "num_experts": _integer(1, MAX_EXPERTS).or_none(),
    "expert_names": Check(
        lambda value: _strings(value, list, tuple) and 1 <= len(value) <= MAX_EXPERTS,
        f"a list of 1 to {MAX_EXPERTS} strings",
    ).or_none(),
    "use_rslora": _BOOL,
    "init_lora_weights": _one_of(True, False, "kaiming", "gaussian"),
    "rank_pattern": _pattern(_RANK),
    "alpha_pattern": _pattern(_NUMBER),
    "modules_to_save": Check(
        lambda value: _strings(value, list, tuple, set), "a list of strings"
    ).or_none(),
    "layers_to_transform": Check(
        lambda value: (
            _INDEX.allows(value)
            or (isinstance(value, list | tuple) and all(map(_INDEX.allows, value)))
        ),
        "an integer >= 0 or a list of them",
    ).or_none(),
    "layers_pattern": Check(
        lambda value: isinstance(value, str) or _strings(value, list, tuple),
        "a string or a list of strings",
    ).or_none(),
    # the routing
    "router": _STRING.or_none(),
    "router_kwargs": Check(_is_json, "a dict of JSON values by argument name"),
    "routing_strategy": _one_of(*get_args(RoutingStrategy)),
    "routing_temperature": Check(
        lambda value: is_number(value) and value > 0, "a finite number > 0"
    ),
    "top_k": _integer(1).or_none(),
    "routing_mode": _one_of("routed", "uniform"),
    "expert_dropout": _PROBABILITY,
    # the checkpoint
    "base_in_channels": _integer(1).or_none(),
    "format_version": _integer(1),
}
"""Checks by field of `MoELoraConfig`, including PEFT's own fields."""


def check_fields(values: Mapping[str, Any]) -> None:
    """Check each field separately.

    Args:
        values: a config's fields by name.

    Raises:
        ValueError: for an invalid value.
    """
    for name, value in values.items():
        check = CHECKS[name]
        if not check.allows(value):
            shown = repr(value)
            shown = shown if len(shown) <= 120 else f"{shown[:120]}…"
            raise ValueError(f"Expected `{name}` to be {check.expected}, but got {shown}.")
