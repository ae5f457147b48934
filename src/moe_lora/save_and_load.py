"""Adapters to files and back, whole or not at all."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, inject_adapter_in_model
from peft.functional import set_adapter
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import CONFIG_NAME, WEIGHTS_NAME
from torch import Tensor, nn

from moe_lora.adapter_tensors import (
    EXPERTS,
    adapter_tensors,
    check_finite,
    check_in_memory,
    is_offloaded_to_disk,
)
from moe_lora.config import PEFT_TYPE, MoELoraConfig
from moe_lora.module_paths import bare_paths, inner_module
from moe_lora.names import check_adapter_name
from moe_lora.routing.control import ROUTER_ATTRIBUTE, adapted_layers, routed_module
from moe_lora.safetensors_io import read_tensors, updating, widened, write_tensors
from moe_lora.state_dict_names import PREFIX, bare_names
from moe_lora.stored import CONFIG_KEY, StoredWeights, read_header
from moe_lora.stored import WEIGHTS_NAME as SAFE_WEIGHTS_NAME
from moe_lora.undo import all_or_nothing

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
DIFFUSERS_KEY = "lora_adapter_metadata"


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default"
) -> Path:
    """Write an adapter, experts and router, as `PeftModel.save_pretrained` would.

    The files are `directory/adapter_config.json` and `directory/adapter_model.safetensors`, and
    hold the same for a model adapted by diffusers' `add_adapter` as for a `PeftModel`, compiled,
    checkpointed or not, with other tuners' adapters or without. Both are written under temporary
    names and renamed when they are whole, so that a program that is killed while it saves leaves
    the previous checkpoint or the new one. Other files in the folder stay. Strengths set by
    `set_scale` are not saved, as in PEFT.

    Args:
        model: the adapted model, or a wrapper around it.
        directory: the folder, created when missing.
        adapter_name: whose experts and router; the name is not stored.

    Returns:
        The folder.

    Raises:
        ValueError: when the adapter does not exist, when its weights are not in memory (offloaded
            or spread over processes), hold NaN or inf, or are not those of all its layers.
    """
    base = routed_module(model)
    configs = getattr(base, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(configs)}, but got {adapter_name!r}."
        )
    tensors = adapter_tensors(base, adapter_name)
    _check_complete(base, adapter_name, tensors)
    check_in_memory(model, tensors)
    check_finite(tensors)
    config = _config_to_save(configs[adapter_name], base)
    named = {PREFIX + name: tensor for name, tensor in tensors.items()}
    folder = Path(directory)
    with updating(folder, last=CONFIG_NAME) as temporary:
        config.save_pretrained(str(temporary))
        # With the config in its header, the weights file is a checkpoint by itself.
        header = {CONFIG_KEY: (temporary / CONFIG_NAME).read_text(encoding="utf-8")}
        write_tensors(temporary / SAFE_WEIGHTS_NAME, named, header)
    return folder


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    config: MoELoraConfig | None = None,
) -> None:
    """Put a saved adapter into a model, in place, or raise and leave the model as it was.

    It reads what `save_adapter` and `PeftModel.save_pretrained` write, and what diffusers'
    `save_lora_adapter` and pipelines' `save_lora_weights` write of a mixture. As with PEFT's and
    diffusers' own loading, the adapter of a `PeftModel` is not activated by it, and that of any
    other model is.

    The experts are float32 in a `PeftModel` and when they are to be trained, as
    `PeftModel.from_pretrained` makes them; otherwise they have their base layer's dtype, as
    diffusers' loaders do it, but float32 where that is an 8-bit one. Routers are float32.

    Args:
        model: a base model, one with other adapters, or a `PeftModel`; or a wrapper around one.
        directory: the folder of the checkpoint.
        adapter_name: what to call the adapter.
        is_trainable: whether its parameters require gradients, to go on training.
        config: the adapter's configuration, for weights without one; by default that of the
            folder or, where there is none, of the weights file's header.

    Raises:
        FileNotFoundError: when the folder or one of its two files is missing.
        ValueError: when a file is corrupt, of another method or of a newer version, or does not
            fit the model or the other file; for NaN or inf; when the adapter's name is taken or
            cannot be one; or when the model's weights are offloaded to where none can be added.
    """
    check_adapter_name(adapter_name)
    tensors, config = _read(Path(directory), config)
    assert config.stored is not None
    host = _host(model)
    taken = getattr(host, "peft_config", {})
    if adapter_name in taken:
        raise ValueError(
            f"Expected a free adapter name, but the model has {sorted(taken)}. Give another "
            "`adapter_name`, or delete that adapter first."
        )
    if is_offloaded_to_disk(model):
        raise ValueError(
            "Expected a model in memory, but its weights are offloaded to disk, where none can be "
            "added. Load the adapter first, and call `enable_group_offload` afterwards."
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
        _fill(routed_module(host), adapter_name, tensors)
        if hasattr(host, "_hf_peft_config_loaded"):
            vars(host)["_hf_peft_config_loaded"] = True


@torch.no_grad()
def _fill(base: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    places = adapter_tensors(base, adapter_name)
    check_in_memory(base, places)
    names = bare_names(tensors, bare_paths(base))
    for name, tensor in tensors.items():
        places[names[name]].copy_(tensor)


def _check_complete(base: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Check that the experts are those of the layers that the adapter was injected into."""
    known = bare_paths(base)
    factors = [
        f"{layer}.{EXPERTS}.{factor}"
        for layer in adapted_layers(base, adapter_name)
        for factor in ("lora_A", "lora_B")
    ]
    expected = set(bare_names(factors, known).values())
    found = {name for name in tensors if f".{EXPERTS}." in f".{name}"}
    if found != expected:
        differing = sorted(found ^ expected)
        raise ValueError(
            f"Expected the experts of the {len(expected) // 2} layers that adapter "
            f"{adapter_name!r} was injected into, but {len(differing)} of their tensors are "
            f"missing or new, such as {differing[0]!r}. Nothing is written: a layer of the model "
            "was removed, replaced or wrapped by something unknown."
        )


def _host(model: nn.Module) -> nn.Module:
    """Return the module, inside any wrappers, that adapters are added to."""
    for module in model.modules():
        if isinstance(module, PeftModel) or module._modules.get(ROUTER_ATTRIBUTE) is not None:
            return module
    while (inside := inner_module(model)) is not None:
        model = inside
    return model


def _config_to_save(config: MoELoraConfig, base: nn.Module) -> MoELoraConfig:
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


def _read(folder: Path, given: MoELoraConfig | None) -> tuple[dict[str, Tensor], MoELoraConfig]:
    """Read the tensors of a checkpoint, and its config, which knows what they look like."""
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a checkpoint's folder at {str(folder)!r}, but got none.")
    config = copy.deepcopy(given)
    if config is None and (folder / CONFIG_NAME).is_file():
        config = _read_config(folder)
    file = _weights_file(folder)
    tensors, header = read_tensors(file)
    if config is None:
        config, component = _config_of_header(file, header)
        tensors = {name: t for name, t in tensors.items() if name.startswith(component)}
    stored = StoredWeights(file, {name: tuple(t.shape) for name, t in tensors.items()})
    config.stored = stored if given is not None else stored.beside(config, header)
    return _checked(file, tensors), config


def _weights_file(folder: Path) -> Path:
    for name in (SAFE_WEIGHTS_NAME, DIFFUSERS_NAME):
        if (folder / name).is_file():
            return folder / name
    hint = "Save the adapter again, or take another copy of the folder."
    if (folder / WEIGHTS_NAME).is_file():
        hint = f"{WEIGHTS_NAME!r} is a pickle, which is never loaded: save as safetensors."
    raise FileNotFoundError(
        f"Expected {SAFE_WEIGHTS_NAME!r} in {str(folder)!r}, but there is none. {hint}"
    )


def _read_config(folder: Path) -> MoELoraConfig:
    file = folder / CONFIG_NAME
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Expected JSON in {str(file)!r}, but it is truncated or corrupt ({error}). Save the "
            "adapter again, or take an earlier copy."
        ) from error
    return _to_config(file, entries, "Load it with `peft.PeftModel.from_pretrained`.")


def _config_of_header(file: Path, header: dict[str, str]) -> tuple[MoELoraConfig, str]:
    """Return the config in a weights file, and the beginning of the keys that it is for."""
    own = read_header(file, header, CONFIG_KEY)
    if own is not None:
        return _to_config(file, own, "Load it with the library that wrote it."), ""
    entries = read_header(file, header, DIFFUSERS_KEY)
    if entries is None:
        raise FileNotFoundError(
            f"Expected {CONFIG_NAME!r} beside {str(file)!r}, but there is none, and the file's "
            "header has no config. Save the adapter again, take another copy of the folder, or "
            "give `config`; a plain LoRA is loaded with diffusers' `load_lora_weights`."
        )
    # A pipeline's file has the component's name before every field and before every key.
    kinds = {name[: -len("peft_type")]: kind for name, kind in entries.items() if _is_kind(name)}
    mixtures = [component for component, kind in kinds.items() if kind == PEFT_TYPE.value]
    if len(mixtures) > 1:
        raise ValueError(
            f"Expected one mixture in {str(file)!r}, but it has those of {sorted(mixtures)}. Save "
            "each of them with moe_lora.save_adapter."
        )
    component = mixtures[0] if mixtures else ""
    told = {k.removeprefix(component): v for k, v in entries.items() if k.startswith(component)}
    otherwise = "It is a plain LoRA of diffusers: load that with `load_lora_weights`."
    return _to_config(file, told, otherwise), component


def _is_kind(name: str) -> bool:
    return name == "peft_type" or name.endswith(".peft_type")


def _to_config(file: Path, entries: Any, otherwise: str) -> MoELoraConfig:
    kind = entries.get("peft_type") if isinstance(entries, dict) else None
    if kind != PEFT_TYPE.value:
        raise ValueError(
            f"Expected a {PEFT_TYPE.value} checkpoint in {str(file)!r}, but its `peft_type` is "
            f"{kind!r}. {otherwise}"
        )
    try:
        config = MoELoraConfig.from_peft_type(**MoELoraConfig.check_kwargs(**entries))
    except (TypeError, ValueError) as error:
        raise ValueError(f"Cannot read {str(file)!r}: {error}") from error
    assert isinstance(config, MoELoraConfig)
    return config


def _checked(file: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: widened(tensor) for name, tensor in tensors.items()}
    odd = [n for n, t in tensors.items() if f".{EXPERTS}." in n and not t.is_floating_point()]
    if odd:
        raise ValueError(
            f"Expected floating-point experts in {str(file)!r}, but {odd[0]!r} is "
            f"{tensors[odd[0]].dtype}. Save the adapter again, or take an earlier copy."
        )
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"Expected finite weights in {str(file)!r}, but {len(broken)} of {len(tensors)} "
            f"tensors hold NaN or inf, such as {broken[0]!r}. Take an earlier checkpoint."
        )
    return tensors
