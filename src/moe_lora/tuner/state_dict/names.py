"""The names of an adapter's tensors in state dicts and files."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from moe_lora.tuner.expert_parameters import EXPERT_DIMENSION, ExpertParameters
from moe_lora.tuner.state_dict.adapter_tensors import (
    EXPERTS,
    ROUTERS,
    adapter_tensors,
    check_in_memory,
    is_offloaded_to_disk,
    parts_of_adapter,
)
from moe_lora.tuner.state_dict.module_paths import bare_path, bare_paths, state_dict_path

PREFIX = "base_model.model."
EXPERTS_PART, ROUTERS_PART = f".{EXPERTS}.", f"{ROUTERS}."
# Prefixes of all keys, from PEFT, pipelines and wrappers around a whole model.
_PREFIXES = (PREFIX, "module.", "model.", "transformer.", "unet.")
_BASE_LAYER_STEPS = re.compile(r"(\.base_layer)+\.")


def bare_names(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Map the names of tensors in a file to those in the bare model.

    Args:
        names: the names in the file.
        known: the bare paths of the model's modules.

    Returns:
        The names without the prefixes and steps of wrappers and pipelines.

    Example:
        >>> name = "transformer.block._orig_mod.to_q.moe_lora_experts.lora_A"
        >>> bare_names([name], {"block", "block.to_q"})[name]
        'block.to_q.moe_lora_experts.lora_A'
    """
    bare = {name: bare_path(name) for name in names}

    def bare_layer_name(name: str) -> str:
        layer, found, rest = name.partition(EXPERTS_PART)
        return bare_path(layer, known=known) + found + rest

    while True:
        layers = {
            bare_layer_name(n).partition(EXPERTS_PART)[0]
            for n in bare.values()
            if EXPERTS_PART in n
        }
        own = [n for n in bare.values() if EXPERTS_PART in n or ROUTERS_PART in n]
        prefix = next((p for p in _PREFIXES if own and all(n.startswith(p) for n in own)), None)
        if prefix is None or layers <= set(known):
            return {name: bare_layer_name(n) for name, n in bare.items()}
        bare = {name: n.removeprefix(prefix) for name, n in bare.items()}


# PEFT looks up the keys of an adapter by its module paths. Wrappers, and other tuners' layers,
# change these paths; the keys of a checkpoint have those of the bare model.


def tensors_to_save(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Select an adapter's tensors from a model's state dict, with the bare model's paths.

    The `modules_to_save` are not included, since PEFT adds them.

    Args:
        model: the module with the injected adapter, or a `PeftModel`.
        adapter_name: the adapter; the keys contain the name.
        state_dict: the model's state dict; empty in processes that do not save.

    Raises:
        ValueError: when tensors are missing, or their values are not in memory.
    """
    found, missing = {}, []
    for path, bare, module in parts_of_adapter(model, adapter_name):
        prefix = f"{state_dict_path(path)}.{adapter_name}."
        keys = {name: f"{prefix}{name}" for name in module.state_dict()}
        missing += [key for key in keys.values() if key not in state_dict]
        state = {name: state_dict[key] for name, key in keys.items() if key in state_dict}
        if isinstance(module, ExpertParameters):
            state = module.join_state(state)
        for name, tensor in state.items():
            found[_with_adapter_name(f"{bare}.{bare_path(name)}", adapter_name)] = tensor
    if missing and state_dict:
        raise ValueError(
            f"Expected the state dict to have all keys of adapter {adapter_name!r}, but "
            f"{len(missing)} of its keys are missing, such as {missing[0]!r}. Pass the state dict "
            "of the whole model, or save with moe_lora.save_adapter."
        )
    if is_offloaded_to_disk(model):
        check_in_memory(model, adapter_tensors(model, adapter_name, joined=False))
    return found


def tensors_to_load(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint to the keys of a model's state dict.

    Args:
        model: the module with the injected adapter, or a `PeftModel`.
        adapter_name: the adapter; the keys do not contain the name.
        state_dict: the checkpoint.
    """
    places = {
        f"{bare}.{bare_path(name)}".removeprefix(PREFIX): (
            f"{state_dict_path(path)}.{adapter_name}.",
            name,
            module,
        )
        for path, bare, module in parts_of_adapter(model, adapter_name)
        for name in _names_when_joined(module)
    }
    names = bare_names(state_dict, {path.removeprefix(PREFIX) for path in bare_paths(model)})
    renamed = {}
    for key, tensor in state_dict.items():
        if names[key] not in places:
            renamed[key] = tensor
            continue
        prefix, name, module = places[names[key]]
        entries = {name: tensor}
        if isinstance(module, ExpertParameters):
            entries = module.split_state(name, tensor)
        renamed |= {prefix + entry: value for entry, value in entries.items()}
    return renamed


def without_adapter_name(key: str, adapter_name: str) -> str | None:
    """Remove an adapter's name from a key of its experts or its router.

    Args:
        key: the key.
        adapter_name: the adapter.

    Returns:
        The key without the name; `None` for other keys.

    Example:
        >>> without_adapter_name("to_q.moe_lora_experts.default.lora_A", "default")
        'to_q.moe_lora_experts.lora_A'
    """
    # In the keys of PEFT's layers the name is the last but one step; routers are nested deeper.
    for part in (EXPERTS, ROUTERS):
        head, found, tail = key.partition(f"{part}.{adapter_name}.")
        if found:
            return f"{head}{part}.{tail}"
    return None


class AdaptedStateDict(OrderedDict[str, Tensor]):
    """State dict that also finds `x.base_layer.base_layer.weight` by the key `x.weight`.

    diffusers' LoRA loader for FLUX looks up a layer's weight by its name in the base model, and
    supports at most one `base_layer`; with two tuners there are two. Iteration and pickling are
    those of the plain dict.
    """

    def __missing__(self, key: str) -> Tensor:
        names = vars(self).get("base_names")
        if names is None:
            names = {_BASE_LAYER_STEPS.sub(".", name): name for name in self}
            self.base_names = names
        if key not in names:
            raise KeyError(key)
        return self[names[key]]

    def __reduce__(self) -> tuple[Any, ...]:
        metadata = {"_metadata": vars(self)["_metadata"]} if "_metadata" in vars(self) else None
        return OrderedDict, (), metadata, None, iter(self.items())


def adapted_state_dict_hook(
    module: nn.Module, state_dict: OrderedDict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> AdaptedStateDict | None:
    """Convert a model's state dict to an `AdaptedStateDict` (state-dict hook of adapted models)."""
    if prefix:
        return None
    found = AdaptedStateDict(state_dict)
    vars(found).update(vars(state_dict))
    return found


def _names_when_joined(module: nn.Module) -> list[str]:
    """Return the names of a module's tensors in a checkpoint."""
    if isinstance(module, ExpertParameters) and module.is_split:
        return list(EXPERT_DIMENSION)
    return list(module.state_dict())


def _with_adapter_name(key: str, adapter_name: str) -> str:
    for part in (EXPERTS, ROUTERS):
        head, found, tail = key.partition(f"{part}.")
        if found:
            return f"{head}{part}.{adapter_name}.{tail}"
    raise AssertionError(key)
