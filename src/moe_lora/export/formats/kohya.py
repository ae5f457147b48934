"""Write the layout of kohya's trainers: flat names, fused projections of Flux, and alphas."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lora.export.formats.flux_names import fuse_flux, is_flux
from moe_lora.export.formats.peft import up_in_shape_of
from moe_lora.export.formats.unet_names import flatten_unet, is_unet
from moe_lora.export.listing import first_few
from moe_lora.export.lora_factors import PlainLora

PREFIX = "lora_unet_"


def kohya_tensors(lora: PlainLora, base_class: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a plain LoRA under kohya's keys, for Flux and for SD 1.5-like UNets.

    Every layer has the same alpha, the largest rank, and `lora_up` makes up for it: diffusers loses
    track of which layer an alpha belongs to when they differ.

    Args:
        lora: the plain LoRA.
        base_class: class name of the base model, if it is known.

    Raises:
        ValueError: for another family of models, or for layers that diffusers' loader of this
            layout drops without a word.
    """
    if is_unet(lora, base_class):
        named, dropped = flatten_unet(lora)
    elif is_flux(lora, base_class):
        named, dropped = fuse_flux(lora)
    else:
        raise ValueError(
            'Expected a Flux transformer or a UNet for format="kohya", but the base model is '
            f'{base_class or "unknown"}. Take format="diffusers" or "peft".'
        )
    if dropped:
        raise ValueError(
            "Expected layers that diffusers loads from kohya's layout, but it would silently drop "
            f'{first_few(dropped)}. Take format="diffusers" or "peft", or leave these layers out '
            "of `target_modules`."
        )
    alpha = max(factors.rank for factors in named.values())
    tensors = {}
    for name, factors in named.items():
        up = factors.up * (factors.rank / alpha)
        tensors[f"{PREFIX}{name}.lora_down.weight"] = factors.down
        tensors[f"{PREFIX}{name}.lora_up.weight"] = up_in_shape_of(factors.down, up)
        tensors[f"{PREFIX}{name}.alpha"] = torch.tensor(float(alpha))
    return tensors
