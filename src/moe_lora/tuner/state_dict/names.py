"""The names of an adapter's tensors in state dicts and files."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

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
# What PEFT, pipelines and wrappers around a whole model put before all keys.
_PREFIXES = (PREFIX, "module.", "model.", "transformer.", "unet.")
_AROUND = re.compile(r"(\.base_layer)+\.")


def bare_names(names: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Map the names in a file to those in a model, without what wrappers and pipelines added.

    Args:
        names: of the tensors in a file.
        known: the bare paths of the model's modules.

    Example:
        >>> name = "transformer.block._orig_mod.to_q.moe_lora_experts.lora_A"
        >>> bare_names([name], {"block", "block.to_q"})[name]
        'block.to_q.moe_lora_experts.lora_A'
    """
    bare = {name: bare_path(name) for name in names}

    def placed(name: str) -> str:
        layer, found, rest = name.partition(EXPERTS_PART)
        return bare_path(layer, known=known) + found + rest

    while True:
        layers = {placed(n).partition(EXPERTS_PART)[0] for n in bare.values() if EXPERTS_PART in n}
        own = [n for n in bare.values() if EXPERTS_PART in n or ROUTERS_PART in n]
        prefix = next((p for p in _PREFIXES if own and all(n.startswith(p) for n in own)), None)
        if prefix is None or layers <= set(known):
            return {name: placed(n) for name, n in bare.items()}
        bare = {name: n.removeprefix(prefix) for name, n in bare.items()}


# PEFT looks the keys of an adapter up by the paths of its modules. Wrappers, and other tuners'
# layers, change these; a checkpoint has those of the bare model.


def tensors_to_save(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Take an adapter's tensors out of a model's state dict, under the bare model's paths.

    What `modules_to_save` names is left out, PEFT finds it by itself.

    Args:
        model: the module that the adapter was injected into, or a `PeftModel`.
        adapter_name: whose tensors; the name is in the keys.
        state_dict: of the model; it may be empty, as in processes that do not save.

    Raises:
        ValueError: when some of the tensors are not there, or do not hold their values.
    """
    keys = _state_dict_keys(model, adapter_name)
    missing = [key for key in keys.values() if key not in state_dict]
    if missing and state_dict:
        raise ValueError(
            f"Expected the state dict to have all of adapter {adapter_name!r}, but "
            f"{len(missing)} of its {len(keys)} keys are not there, such as {missing[0]!r}. "
            "Give the state dict of the whole model, or save with moe_lora.save_adapter."
        )
    if is_offloaded_to_disk(model):
        check_in_memory(model, adapter_tensors(model, adapter_name))
    return {
        _with_adapter_name(bare, adapter_name): state_dict[key]
        for bare, key in keys.items()
        if key in state_dict
    }


def tensors_to_load(
    model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Give the tensors of a checkpoint the keys of a model's state dict.

    Args:
        model: the module that the adapter was injected into, or a `PeftModel`.
        adapter_name: whose tensors; the name is not in the keys.
        state_dict: the checkpoint.
    """
    places = {
        bare.removeprefix(PREFIX): key
        for bare, key in _state_dict_keys(model, adapter_name).items()
    }
    names = bare_names(state_dict, {path.removeprefix(PREFIX) for path in bare_paths(model)})
    return {places.get(names[key], key): tensor for key, tensor in state_dict.items()}


def without_adapter_name(key: str, adapter_name: str) -> str | None:
    """Take an adapter's name out of a key of its experts or its router; `None` for other keys.

    Example:
        >>> without_adapter_name("to_q.moe_lora_experts.default.lora_A", "default")
        'to_q.moe_lora_experts.lora_A'
    """
    # A router is deeper than PEFT's own layers, which have the name in the last place but one.
    for part in (EXPERTS, ROUTERS):
        head, found, tail = key.partition(f"{part}.{adapter_name}.")
        if found:
            return f"{head}{part}.{tail}"
    return None


class AdaptedStateDict(OrderedDict[str, Tensor]):
    """Find `x.weight` where only `x.base_layer.base_layer.weight` is, as it is below two tuners.

    diffusers' loader of LoRAs for FLUX looks a layer's weight up by its name in the base model,
    and knows of one `base_layer` at most. Keys and pickles are those of the plain dict.
    """

    def __missing__(self, key: str) -> Tensor:
        names = vars(self).get("base_names")
        if names is None:
            names = {_AROUND.sub(".", name): name for name in self}
            self.base_names = names
        if key not in names:
            raise KeyError(key)
        return self[names[key]]

    def __reduce__(self) -> tuple[Any, ...]:
        metadata = {"_metadata": vars(self)["_metadata"]} if "_metadata" in vars(self) else None
        return OrderedDict, (), metadata, None, iter(self.items())


def find_by_base_name(
    module: nn.Module, state_dict: OrderedDict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> AdaptedStateDict | None:
    """Make a model's state dict an `AdaptedStateDict` (a state-dict hook of adapted models)."""
    if prefix:
        return None
    found = AdaptedStateDict(state_dict)
    vars(found).update(vars(state_dict))
    return found


def _state_dict_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Map the keys that an adapter has in a checkpoint to those in the model's state dict."""
    return {
        f"{bare}.{bare_path(name)}": f"{state_dict_path(path)}.{adapter_name}.{name}"
        for path, bare, module in parts_of_adapter(model, adapter_name)
        for name in module.state_dict()
    }


def _with_adapter_name(key: str, adapter_name: str) -> str:
    for part in (EXPERTS, ROUTERS):
        head, found, tail = key.partition(f"{part}.")
        if found:
            return f"{head}{part}.{adapter_name}.{tail}"
    raise AssertionError(key)
