"""Build a mixture from plain LoRA files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
from torch import nn

from moe_lora.export.expert_table import experts_by_layer
from moe_lora.export.formats.lora_file import StoredFactors
from moe_lora.export.formats.match_layers import read_lora_for
from moe_lora.export.formats.peft import exact_targets, ranks_config
from moe_lora.routing.routers.registry import router_class
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.experts import MoELoraExperts
from moe_lora.tuner.rollback import all_or_nothing
from moe_lora.tuner.state_dict.module_paths import bare_modules, inner_module


def from_loras(
    files: Mapping[str, str | os.PathLike[str]],
    model: nn.Module,
    *,
    adapter_name: str = "default",
    skip: Sequence[str] = (),
    autocast_adapter_dtype: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a mixture from plain LoRA files and inject it into a model, in place.

    Every file becomes one expert: at one-hot weights the mixture is exactly that LoRA. Ranks and
    alphas may differ from file to file and from layer to layer; a layer has the largest rank that
    some file has there, and an expert without a LoRA in a layer adds nothing until it is trained.

    Args:
        files: the path of a plain LoRA for every expert's name, in the order of the experts. A
            safetensors file or a folder; keys of PEFT, diffusers, kohya or a model's original
            code.
        model: the base model.
        adapter_name: the adapter's name.
        skip: beginnings of keys to leave out, such as "lora_te" of a text encoder.
        autocast_adapter_dtype: keep the experts in float32 where the base is float16 or bfloat16,
            to train them; else they have the dtype of their base layer.
        options: further fields of `MoELoraConfig`, such as `router="three_expert_removal"`.

    Returns:
        The model, with the mixture in it.

    Raises:
        FileNotFoundError: when a file is missing.
        TypeError: when the model is a `PeftModel`; give the model inside it.
        ValueError: when a file cannot be read, is more than a plain LoRA, was trained on base
            weights that its initialization changed, names layers that the model does not have,
            or has other sizes; when layers are inside wrappers; or when the adapter's name is
            taken. The model is then as it was.
    """
    if isinstance(model, PeftModel):
        raise TypeError("Expected the base model, but got a PeftModel. Pass its base model.")
    if not files:
        raise ValueError("Expected at least one file to build experts of, but got none.")
    if adapter_name in getattr(model, "peft_config", {}):
        raise ValueError(f"Expected an unused `adapter_name`, but {adapter_name!r} exists.")
    loras = {name: read_lora_for(model, path, skip) for name, path in files.items()}
    config = _config(loras, options)
    _check_bare(model, loras)
    with all_or_nothing(model):
        _inject(model, config, adapter_name)
        if autocast_adapter_dtype:
            cast_adapter_dtype(model, adapter_name)
        layers = experts_by_layer(model, adapter_name)
        for index, lora in enumerate(loras.values()):
            for path, stored in lora.items():
                _copy_expert(layers[path], index, stored)
    return model


def _check_bare(model: nn.Module, loras: Mapping[str, Mapping[str, StoredFactors]]) -> None:
    # PEFT goes by the paths that the model has now; a checkpoint holds those of the bare model.
    forms = reversed(list(bare_modules(model)))
    outermost = {bare: (path, module) for path, bare, module in forms}
    for path in sorted({path for lora in loras.values() for path in lora}):
        here, layer = outermost[path]
        wrapped = not isinstance(layer, BaseTunerLayer) and inner_module(layer) is not None
        if here != path or wrapped:
            raise ValueError(
                f"Expected {path!r} to be a layer of the bare model, but it is inside a wrapper, "
                "such as those of torch.compile and activation checkpointing. Wrap or compile it "
                "after from_loras."
            )


def _config(
    loras: Mapping[str, Mapping[str, StoredFactors]], options: Mapping[str, Any]
) -> MoELoraConfig:
    ranks: dict[str, int] = {}
    for lora in loras.values():
        for path, stored in lora.items():
            ranks[path] = max(ranks.get(path, 1), stored.down.shape[0])
    config = MoELoraConfig(
        expert_names=tuple(loras),
        target_modules=exact_targets(ranks),
        **ranks_config(ranks),
        **options,
    )
    if config.router is not None:
        router_class(config.router)
    return config


def _inject(model: nn.Module, config: MoELoraConfig, adapter_name: str) -> None:
    if hasattr(model, "add_adapter"):
        add_adapter: Any = model.add_adapter
        add_adapter(config, adapter_name=adapter_name)
    else:
        inject_adapter_in_model(config, model, adapter_name)


@torch.no_grad()
def _copy_expert(experts: MoELoraExperts, index: int, stored: StoredFactors) -> None:
    # Rows of A beyond the file's rank keep what they were drawn as, so that they can be trained;
    # B is zero there.
    factors = stored.factors()
    lora_A, lora_B = experts.expert(index)
    lora_A[: factors.rank].copy_(factors.down)
    lora_B[:, : factors.rank].copy_(factors.up)
