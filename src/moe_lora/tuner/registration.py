"""The only place that touches PEFT's mappings."""

from __future__ import annotations

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from moe_lora.tuner.config import PEFT_TYPE, MoELoraConfig
from moe_lora.tuner.model import MoELoraModel


def register() -> None:
    """Make `"MOE_LORA"` a PEFT method; calling it again changes nothing.

    `PeftType` is a closed enumeration, but all that saves, loads and injects only looks names up
    in these mappings, where a string is as good a key.

    Raises:
        RuntimeError: when the name already belongs to another method.
    """
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, MoELoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, MoELoraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, MoELoraModel.prefix),
    ]
    for mapping, value in entries:
        if mapping.setdefault(PEFT_TYPE, value) != value:
            raise RuntimeError(
                f"Expected the PEFT method {PEFT_TYPE.value!r} to be free, but it is registered "
                f"as {mapping[PEFT_TYPE]}."
            )
