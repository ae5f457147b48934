"""Adapters to files and back, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

from peft import PeftModel, inject_adapter_in_model
from peft.functional import set_adapter
from peft.utils import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

from moe_lora.config import PEFT_TYPE, MoELoraConfig
from moe_lora.files import read_tensors, write_tensors
from moe_lora.routing.control import ROUTER_ATTRIBUTE, routed_module
from moe_lora.stored import PREFIX
from moe_lora.stored import WEIGHTS_NAME as SAFE_WEIGHTS_NAME
from moe_lora.undo import all_or_nothing

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default"
) -> Path:
    """Write an adapter, experts and router, as `PeftModel.save_pretrained` would.

    The files are `directory/adapter_config.json` and `directory/adapter_model.safetensors`, and
    hold the same for a model adapted by diffusers' `add_adapter` as for a `PeftModel`. Both are
    written under temporary names and renamed when they are whole, so that a program that is
    killed while it saves leaves the previous checkpoint. Other files in the folder stay.

    Args:
        model: the adapted model, or a wrapper around it.
        directory: the folder, created when missing.
        adapter_name: whose experts and router; the name is not stored.

    Returns:
        The folder.

    Raises:
        ValueError: when the adapter does not exist, or its weights are not in memory.
    """
    base = routed_module(model)
    configs = getattr(base, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(configs)}, but got {adapter_name!r}."
        )
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        base, adapter_name=adapter_name, save_embedding_layers=False
    )
    away = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if away is not None:
        raise ValueError(
            f"Expected the adapter's weights in memory, but {away!r} is on the meta device. Load "
            "or initialise it, or remove the model's offloading hooks, before saving."
        )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        named = {PREFIX + name: tensor for name, tensor in tensors.items()}
        write_tensors(temporary / SAFE_WEIGHTS_NAME, named)
        _write_config(configs[adapter_name], base, temporary)
        os.replace(temporary / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_NAME)
        if not _same(temporary / CONFIG_NAME, folder / CONFIG_NAME):
            os.replace(temporary / CONFIG_NAME, folder / CONFIG_NAME)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
) -> None:
    """Put a saved adapter into a model, in place, or raise and leave the model as it was.

    It reads what `save_adapter` and `PeftModel.save_pretrained` write. As with PEFT's and
    diffusers' own loading, the adapter of a `PeftModel` is not activated by it, and that of any
    other model is.

    Args:
        model: a base model, one with other adapters, or a `PeftModel`.
        directory: the folder of the checkpoint.
        adapter_name: what to call the adapter.
        is_trainable: whether its parameters require gradients, to go on training.

    Raises:
        FileNotFoundError: when the folder or one of its two files is missing.
        ValueError: when a file is corrupt, of another method or of a newer version, or does not
            fit the model; for NaN or inf; or when the adapter's name is taken.
    """
    folder = Path(directory)
    config = _read_config(folder)
    tensors = _read_weights(folder)
    host = _host(model)
    taken = getattr(host, "peft_config", {})
    if adapter_name in taken:
        raise ValueError(
            f"Expected a free adapter name, but the model has {sorted(taken)}. Give another "
            "`adapter_name`, or delete that adapter first."
        )
    config.inference_mode = not is_trainable
    with all_or_nothing(model):
        if isinstance(host, PeftModel):
            host.add_adapter(adapter_name, config)
            if is_trainable:
                host.set_requires_grad(adapter_name)
        else:
            inject_adapter_in_model(config, host, adapter_name)
            set_adapter(host, adapter_name, inference_mode=not is_trainable)
            tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        set_peft_model_state_dict(host, tensors, adapter_name)
        if hasattr(host, "_hf_peft_config_loaded"):
            vars(host)["_hf_peft_config_loaded"] = True


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _host(model: nn.Module) -> nn.Module:
    """Return the module, inside any wrappers, that adapters are added to."""
    for module in model.modules():
        if isinstance(module, PeftModel) or module._modules.get(ROUTER_ATTRIBUTE) is not None:
            return module
    return model


def _write_config(config: MoELoraConfig, base: nn.Module, folder: Path) -> None:
    saved = copy.copy(config)
    saved.inference_mode = True
    if saved.base_model_name_or_path is None:
        saved.base_model_name_or_path = vars(base).get("name_or_path")
    origin = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    saved.save_pretrained(
        str(folder), auto_mapping_dict=origin if saved.task_type is None else None
    )


def _read_config(folder: Path) -> MoELoraConfig:
    file = folder / CONFIG_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a checkpoint's folder at {str(folder)!r}, but got none.")
    if not file.is_file():
        hint = "Save the adapter again, or take another copy of the folder."
        if (folder / DIFFUSERS_NAME).is_file():
            hint = "It holds a plain LoRA of diffusers: load that with `load_lora_weights`."
        raise FileNotFoundError(
            f"Expected {CONFIG_NAME!r} in {str(folder)!r}, but there is none. {hint}"
        )
    try:
        entries = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"Expected JSON in {str(file)!r}, but it is truncated or corrupt ({error}). Save the "
            "adapter again, or take an earlier copy."
        ) from error
    kind = entries.get("peft_type") if isinstance(entries, dict) else None
    if kind != PEFT_TYPE.value:
        raise ValueError(
            f"Expected a {PEFT_TYPE.value} checkpoint in {str(folder)!r}, but its `peft_type` is "
            f"{kind!r}. Load it with `peft.PeftModel.from_pretrained`."
        )
    try:
        config = MoELoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Cannot read {str(file)!r}: {error}") from error
    assert isinstance(config, MoELoraConfig)
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / SAFE_WEIGHTS_NAME
    if not file.is_file():
        hint = "Save the adapter again, or take another copy of the folder."
        if (folder / WEIGHTS_NAME).is_file():
            hint = f"{WEIGHTS_NAME!r} is a pickle, which is never loaded: save as safetensors."
        raise FileNotFoundError(
            f"Expected {SAFE_WEIGHTS_NAME!r} in {str(folder)!r}, but there is none. {hint}"
        )
    tensors, _ = read_tensors(file)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"Expected finite weights in {str(file)!r}, but {len(broken)} of {len(tensors)} "
            f"tensors hold NaN or inf, such as {broken[0]!r}. Take an earlier checkpoint."
        )
    return tensors
