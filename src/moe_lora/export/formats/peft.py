"""How a plain LoRA is laid out in a file, for each of its consumers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from peft import LoraConfig
from torch import Tensor

from moe_lora.export.formats.flux_names import PREFIX, flatten_unet, flux_name, fuse_flux
from moe_lora.export.listing import first_few
from moe_lora.export.lora_factors import PlainLora

Format = Literal["diffusers", "peft", "kohya"]
METADATA_KEY = "moe_lora"

_UNET_ROOTS = re.compile(
    r"(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)(\.|$)"
)


def header(**entries: Any) -> dict[str, str]:
    """Return what moe_lora notes in a file's metadata: JSON, with the library's version."""
    from moe_lora import __version__

    return {METADATA_KEY: json.dumps({"version": __version__, **entries})}


def is_unet(paths: Collection[str], base_class: str | None) -> bool:
    """Tell whether layers belong to a UNet, by the model's class or else by their paths."""
    if base_class is not None:
        return "UNet" in base_class
    return all(_UNET_ROOTS.match(path) for path in paths)


def exact_targets(paths: Collection[str]) -> list[str] | str:
    """Return `target_modules` that match these layers and no other.

    Whole paths, or a regex when one of them has no block index and so could be the ending of
    another layer's path: `proj_out` is one of `single_transformer_blocks.0.proj_out`.

    Example:
        >>> exact_targets(["blocks.0.to_q"]), exact_targets(["proj_out"])
        (['blocks.0.to_q'], '(?:proj_out)')
    """
    ordered = sorted(paths)
    if all(re.search(r"\.\d+\.", path) for path in ordered):
        return ordered
    return f"(?:{'|'.join(re.escape(path) for path in ordered)})"


def anchored(path: str) -> str:
    """Return a key of `rank_pattern` that matches this layer and no other.

    Example:
        >>> print(anchored("proj_out"))
        ^proj_out
    """
    return f"^{re.escape(path)}"


def ranks_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a config that give every layer its rank, and alpha equal to it.

    Args:
        ranks: the rank of every layer.

    Example:
        >>> ranks_config({"a.0.q": 4, "a.1.q": 4, "a.2.q": 2})["rank_pattern"]
        {'^a\\\\.2\\\\.q': 2}
    """
    usual = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {anchored(path): rank for path, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }


def plain_config(lora: PlainLora, base_model: str | None = None) -> LoraConfig:
    """Return the PEFT config of a plain LoRA whose strength is in its factors."""
    return LoraConfig(
        **ranks_config({path: factors.rank for path, factors in lora.items()}),
        target_modules=exact_targets(lora),
        base_model_name_or_path=base_model,
        inference_mode=True,
    )


def peft_tensors(lora: PlainLora, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """Return the tensors of a plain LoRA under PEFT's keys.

    Args:
        lora: the plain LoRA.
        prefix: before the layers' paths.
    """
    tensors = {}
    for path, factors in lora.items():
        tensors[f"{prefix}{path}.lora_A.weight"] = factors.down
        tensors[f"{prefix}{path}.lora_B.weight"] = _shaped_up(factors.down, factors.up)
    return tensors


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
    told = {f"{component}.{name}": value for name, value in fields.items()}
    return peft_tensors(lora, f"{component}."), {"lora_adapter_metadata": json.dumps(told)}


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
    elif _is_flux(lora, base_class):
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
        tensors[f"{PREFIX}{name}.lora_up.weight"] = _shaped_up(factors.down, up)
        tensors[f"{PREFIX}{name}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _is_flux(paths: Collection[str], base_class: str | None) -> bool:
    if base_class is not None:
        return base_class == "FluxTransformer2DModel"
    # Other families share the names of the double blocks.
    return any(path.startswith("single_transformer_blocks.") and flux_name(path) for path in paths)


def _shaped_up(down: Tensor, up: Tensor) -> Tensor:
    return up if down.ndim == 2 else up.view(*up.shape, *[1] * (down.ndim - 2))
