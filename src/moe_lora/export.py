"""Experts to plain LoRA files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from peft import LoraConfig
from torch import Tensor, nn

from moe_lora.config import MoELoraConfig
from moe_lora.files import replacing, write_tensors
from moe_lora.layer import MoELoraExperts, MoELoraLinear
from moe_lora.routing.control import routed_module


def save_experts(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default"
) -> list[Path]:
    """Write every expert as a plain PEFT LoRA, which stock PEFT loads onto the base model.

    An expert alone is what the mixture gives at one-hot weights. The files are
    `directory/<expert_name>/adapter_config.json` and `adapter_model.safetensors`; each folder is
    written under a temporary name and renamed when it is whole.

    Args:
        model: the adapted model, or a wrapper around it.
        directory: where the expert folders go; created when missing.
        adapter_name: whose experts.

    Returns:
        The folders, in the order of the experts.

    Raises:
        ValueError: when the model or the adapter does not exist.
    """
    base = routed_module(model)
    layers = dict(_adapted_layers(base, adapter_name))
    if not layers:
        raise ValueError(f"Expected an adapter named {adapter_name!r}, but the model has none.")
    configs = base.peft_config
    assert isinstance(configs, dict)
    config: MoELoraConfig = configs[adapter_name]
    lora_config = _plain_config(config, layers)
    folders = []
    for index, name in enumerate(config.experts):
        tensors: dict[str, Tensor] = {}
        for path, experts in layers.items():
            lora_A, lora_B = experts.lora_A.detach(), experts.lora_B.detach()
            tensors[f"base_model.model.{path}.lora_A.weight"] = lora_A[index]
            tensors[f"base_model.model.{path}.lora_B.weight"] = lora_B[:, index]
        folder = Path(directory) / name
        with replacing(folder) as temporary:
            write_tensors(temporary / "adapter_model.safetensors", tensors)
            lora_config.save_pretrained(str(temporary))
        folders.append(folder)
    return folders


def _adapted_layers(base: nn.Module, adapter_name: str) -> Iterator[tuple[str, MoELoraExperts]]:
    for path, module in base.named_modules():
        if isinstance(module, MoELoraLinear) and adapter_name in module.moe_lora_experts:
            experts = module.moe_lora_experts[adapter_name]
            assert isinstance(experts, MoELoraExperts)
            yield path, experts


def _plain_config(config: MoELoraConfig, layers: dict[str, MoELoraExperts]) -> LoraConfig:
    # The exact layers by their whole paths: a pattern could match more in another base model.
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=sorted(layers),
        rank_pattern={path: e.r for path, e in layers.items() if e.r != config.r},
        alpha_pattern={
            path: e.lora_alpha for path, e in layers.items() if e.lora_alpha != config.lora_alpha
        },
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
