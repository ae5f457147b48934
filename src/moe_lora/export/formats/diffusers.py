"""Write the layout of diffusers: keys with the component's name, and the config in the header."""

from __future__ import annotations

import json

from torch import Tensor

from moe_lora.checkpoint_reader import DIFFUSERS_KEY
from moe_lora.export.formats.peft import exact_targets, peft_tensors, ranks_config
from moe_lora.export.formats.unet_names import is_unet
from moe_lora.export.lora_factors import PlainLora


def diffusers_file(
    lora: PlainLora, base_class: str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a file for diffusers' `load_lora_weights`.

    The header tells current diffusers ranks and alphas; alpha equals the rank, which is what
    everything that does not read the header assumes.

    Args:
        lora: the plain LoRA.
        base_class: class name of the base model, if it is known.
    """
    component = "unet" if is_unet(lora, base_class) else "transformer"
    fields = ranks_config({path: factors.rank for path, factors in lora.items()})
    fields |= {"target_modules": exact_targets(lora)}
    fields = {f"{component}.{name}": value for name, value in fields.items()}
    return peft_tensors(lora, f"{component}."), {DIFFUSERS_KEY: json.dumps(fields)}
