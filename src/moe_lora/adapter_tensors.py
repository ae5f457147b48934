"""The tensors of an adapter under the keys of a checkpoint, whatever wraps the model's modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

EXPERTS, ROUTERS = "moe_lora_experts", "moe_lora_routers"

# What torch.compile, FSDP and activation checkpointing call the module that they wrap. The state
# dicts of the latter two are without these names.
_COMPILED = "_orig_mod"
_HIDDEN = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(path: str) -> str:
    """Return a module's path without what wrappers put into it.

    Example:
        >>> unwrapped("blocks.0._orig_mod.to_q")
        'blocks.0.to_q'
    """
    return _without(path, (_COMPILED, *_HIDDEN))


def inner_module(module: nn.Module) -> nn.Module:
    """Return what known wrappers around a module wrap, and a module without any as it is."""
    while (name := _inner_name(module)) is not None and not isinstance(module, BaseTunerLayer):
        module = module._modules[name]  # type: ignore[assignment]
    return module


def bare_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield path, bare path and module of every module.

    The bare path is that in the model without wrappers and without other tuners' layers, under
    which checkpoints name a layer.

    Args:
        model: the model; a wrapper around it is not taken off.
    """
    bare: dict[str, str] = {}
    inner: dict[str, str | None] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if not path:
            bare[path] = ""
        elif inner[parent] == name:
            bare[path] = bare[parent]
        else:
            bare[path] = _join(bare[parent], name)
        inner[path] = _inner_name(module)
        yield path, bare[path], module


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's own parameters and buffers, by their keys in a checkpoint.

    Args:
        model: the module that the adapter was injected into, or a `PeftModel`.
        adapter_name: whose tensors.
    """
    found: dict[str, Tensor] = {}
    for _, bare, module in bare_modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict(keep_vars=True)
            names = module.adapter_state_dict_load_map(adapter_name)
            found |= {_join(bare, unwrapped(name)): state[inner] for name, inner in names.items()}
    for _, bare, module in _held(model, adapter_name):
        for name, tensor in module.state_dict(keep_vars=True).items():
            found[f"{bare}.{unwrapped(name)}"] = tensor
    return found


def state_dict_keys(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Map the keys that an adapter has in a checkpoint to those in the model's state dict.

    What `modules_to_save` names is left out, PEFT finds it by itself.

    Args:
        model: the module that the adapter was injected into, or a `PeftModel`.
        adapter_name: whose keys.
    """
    return {
        f"{bare}.{unwrapped(name)}": f"{_without(path, _HIDDEN)}.{adapter_name}.{name}"
        for path, bare, module in _held(model, adapter_name)
        for name in module.state_dict()
    }


def check_in_memory(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check that tensors hold their values, which offloading and sharding may keep elsewhere.

    Args:
        model: the model, with its offloading hooks.
        tensors: its own parameters and buffers (not copies, not detached) by name.

    Raises:
        ValueError: for a tensor on the meta device, on disk, in pieces, or empty.
    """
    on_disk = {id(tensor) for tensor in _offloaded_to_disk(model)}
    for name, tensor in tensors.items():
        matrix = name.endswith((".lora_A", ".lora_B"))
        if tensor.is_meta:
            where = "is on the meta device"
        elif id(tensor) in on_disk:
            where = "is offloaded to disk"
        elif hasattr(tensor, "full_tensor") or tensor.numel() == 0 or (matrix and tensor.ndim < 3):
            where = "is spread over processes"
        else:
            continue
        raise ValueError(
            f"Expected the adapter's weights in memory, but {name!r} {where}. Load or initialize "
            "it, or remove the model's offloading hooks, first; of a model spread over processes, "
            "save the gathered state, as the guide on several processes shows."
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check that there is no NaN or inf, with which a checkpoint would not be loaded.

    Args:
        tensors: by name.

    Raises:
        ValueError: for a tensor with NaN or inf.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"Expected finite weights, but {len(broken)} of {len(tensors)} tensors hold NaN or "
            f"inf, such as {broken[0]!r}. Nothing is written: go on from an earlier checkpoint."
        )


def is_checkpoint_wrapper(module: nn.Module) -> bool:
    """Tell whether a module is torch's wrapper that checkpoints another module's activations."""
    return "_checkpoint_wrapped_module" in module._modules


def is_offloaded_to_disk(model: nn.Module) -> bool:
    """Tell whether diffusers' group offloading keeps any of a model's weights on disk."""
    return next(_offloaded_to_disk(model), None) is not None


def _held(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the experts of every layer, and the router, each with path and bare path.

    The adapter's name is in neither path.
    """
    for path, bare, module in bare_modules(model):
        for attribute in (EXPERTS, ROUTERS):
            by_name = module._modules.get(attribute)
            if isinstance(by_name, nn.ModuleDict) and adapter_name in by_name:
                yield _join(path, attribute), _join(bare, attribute), by_name[adapter_name]


def _offloaded_to_disk(model: nn.Module) -> Iterator[Tensor]:
    # A group's tensors are uninitialized memory while they are not computed with, and on a CPU
    # nothing tells when that is.
    for module in model.modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            group: Any = getattr(hook, "group", None)
            if getattr(group, "offload_to_disk_path", None) is not None:
                yield from group.tensor_to_key


def _inner_name(module: nn.Module) -> str | None:
    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    if isinstance(module, _PARALLEL):
        return "module"
    return next((name for name in (_COMPILED, *_HIDDEN) if name in module._modules), None)


def _without(path: str, names: tuple[str, ...]) -> str:
    return ".".join(part for part in path.split(".") if part not in names)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
