"""Registration of the PEFT method in PEFT's mappings."""

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
    """Register `"MOE_LORA"` as a PEFT method; later calls have no effect.

    `PeftType` is a closed enumeration, but PEFT saves, loads and injects by looking up names in
    these mappings, and a string works as a key.

    Raises:
        RuntimeError: when the name is registered for another method.
    """
    entries: list[tuple[dict[Any, Any], Any]] = [
        (PEFT_TYPE_TO_CONFIG_MAPPING, MoELoraConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, MoELoraModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, MoELoraModel.prefix),
    ]
    for mapping, value in entries:
        if mapping.setdefault(PEFT_TYPE, value) != value:
            raise RuntimeError(
                f"Expected the PEFT method {PEFT_TYPE.value!r} to be unregistered, but it is "
                f"registered as {mapping[PEFT_TYPE]}."
            )
