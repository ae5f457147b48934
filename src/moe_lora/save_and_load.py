"""Saving adapters to checkpoints and loading them into models, atomically."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from moe_lora.checkpoint_reader import read_checkpoint
from moe_lora.routing.control import adapted_layers
from moe_lora.routing.lookup import ROUTER_ATTRIBUTE, routed_module
from moe_lora.safetensors_io import updating, write_tensors
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.rollback import all_or_nothing
from moe_lora.tuner.state_dict.adapter_tensors import (
    EXPERTS,
    adapter_tensors,
    check_finite,
    check_in_memory,
    is_offloaded_to_disk,
)
from moe_lora.tuner.state_dict.module_paths import bare_paths, inner_module
from moe_lora.tuner.state_dict.names import EXPERTS_PART, PREFIX, bare_names
from moe_lora.tuner.state_dict.stored import CONFIG_KEY, WEIGHTS_NAME
from moe_lora.tuner.validation.names import check_adapter_name


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default"
) -> Path:
    """Save an adapter, experts and router, in the format of `PeftModel.save_pretrained`.

    The files are `directory/adapter_config.json` and `directory/adapter_model.safetensors`. They do
    not depend on wrappers of the model (`PeftModel`, diffusers' `add_adapter`, compiling,
    checkpointing) or adapters of other tuners. Both are written under temporary names and renamed
    when they are complete, so that a program that is killed while it saves leaves the previous
    checkpoint or the new one. Other files in the folder stay. As in PEFT, scalings set by
    `set_scale` are not saved.

    Args:
        model: the adapted model, or a wrapper around it.
        directory: the folder, created when missing.
        adapter_name: the adapter; the name is not stored.

    Returns:
        The folder.

    Raises:
        ValueError: when the adapter does not exist, or when its weights are not in memory
            (offloaded or sharded), have NaN or inf, or do not cover all its layers.
    """
    base = routed_module(model)
    configs = getattr(base, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(configs)}, but got {adapter_name!r}."
        )
    check_in_memory(model, adapter_tensors(base, adapter_name, joined=False))
    tensors = adapter_tensors(base, adapter_name)
    _check_complete(base, adapter_name, tensors)
    check_finite(tensors)
    config = _prepare_config(configs[adapter_name], base)
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    folder = Path(directory)
    with updating(folder, last=CONFIG_NAME) as temporary:
        config.save_pretrained(str(temporary))
        # With the config in its header, the weights file alone is a complete checkpoint.
        header = {CONFIG_KEY: (temporary / CONFIG_NAME).read_text(encoding="utf-8")}
        write_tensors(temporary / WEIGHTS_NAME, named, header)
    return folder


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    config: MoELoraConfig | None = None,
) -> None:
    """Load a saved adapter into a model, in place; when an error is raised, the model is unchanged.

    Supported files are those of `save_adapter`, `PeftModel.save_pretrained`, diffusers'
    `save_lora_adapter` and pipelines' `save_lora_weights`. As with PEFT's and diffusers' own
    loading, the adapter of a `PeftModel` is not activated, and that of any other model is.

    The experts are float32 in a `PeftModel` and for training, as with `PeftModel.from_pretrained`;
    otherwise they have their base layer's dtype, as with diffusers' loaders, but float32 for 8-bit
    floats. Routers are float32.

    Args:
        model: a base model, one with other adapters, or a `PeftModel`; or a wrapper around one.
        directory: the folder of the checkpoint.
        adapter_name: the name of the adapter in the model.
        is_trainable: whether the adapter's parameters require gradients, to continue training.
        config: the adapter's configuration, for weights without one; by default that of the
            folder or else of the weights file's header.

    Raises:
        FileNotFoundError: when the folder or one of its two files is missing.
        ValueError: when a file is corrupt, of another method or of a newer version, or does not
            match the model or the other file; for NaN or inf; when the adapter's name is used or
            invalid; or when the model's weights are offloaded to disk.
    """
    check_adapter_name(adapter_name)
    checkpoint = read_checkpoint(directory, config)
    config = checkpoint.config
    host = _adapter_host(model)
    taken = getattr(host, "peft_config", {})
    if adapter_name in taken:
        raise ValueError(
            f"Expected an unused adapter name, but the model has {sorted(taken)}. Choose another "
            "`adapter_name`, or delete that adapter first."
        )
    if is_offloaded_to_disk(model):
        raise ValueError(
            "Expected a model in memory, but its weights are offloaded to disk. Load the adapter "
            "first, and call `enable_group_offload` afterwards."
        )
    config.inference_mode = not is_trainable
    with all_or_nothing(model):
        if isinstance(host, PeftModel):
            host.add_adapter(adapter_name, config)
            if is_trainable:
                host.set_requires_grad(adapter_name)
        else:
            inject_adapter_in_model(config, host, adapter_name)
            cast_adapter_dtype(host, adapter_name, autocast_adapter_dtype=is_trainable)
            set_adapter(host, adapter_name, inference_mode=not is_trainable)
        _copy_tensors(routed_module(host), adapter_name, checkpoint.tensors)
        if hasattr(host, "_hf_peft_config_loaded"):
            vars(host)["_hf_peft_config_loaded"] = True


@torch.no_grad()
def _copy_tensors(base: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    parameters = adapter_tensors(base, adapter_name)
    check_in_memory(base, parameters)
    names = bare_names(tensors, bare_paths(base))
    for name, tensor in tensors.items():
        parameters[names[name]].copy_(tensor)


def _check_complete(base: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Check that the tensors are the experts of all layers of the adapter."""
    known = bare_paths(base)
    factors = [
        f"{layer}.{EXPERTS}.{factor}"
        for layer in adapted_layers(base, adapter_name)
        for factor in ("lora_A", "lora_B")
    ]
    expected = set(bare_names(factors, known).values())
    found = {name for name in tensors if EXPERTS_PART in f".{name}"}
    if found != expected:
        differing = sorted(found ^ expected)
        raise ValueError(
            f"Expected the experts of the {len(expected) // 2} layers of adapter "
            f"{adapter_name!r}, but {len(differing)} of their tensors are missing or new, such as "
            f"{differing[0]!r}. Nothing was written: a layer of the model was removed, replaced or "
            "wrapped by an unknown wrapper."
        )


def _adapter_host(model: nn.Module) -> nn.Module:
    """Return the module for adding adapters, inside any wrappers."""
    for module in model.modules():
        if isinstance(module, PeftModel) or module._modules.get(ROUTER_ATTRIBUTE) is not None:
            return module
    while (inside := inner_module(model)) is not None:
        model = inside
    return model


def _prepare_config(config: MoELoraConfig, base: nn.Module) -> MoELoraConfig:
    saved = copy.copy(config)
    saved.inference_mode = True
    if saved.base_model_name_or_path is None:
        saved.base_model_name_or_path = vars(base).get("name_or_path")
    if saved.task_type is None:
        saved.auto_mapping = {
            "base_model_class": type(base).__name__,
            "parent_library": type(base).__module__,
        }
    return saved
