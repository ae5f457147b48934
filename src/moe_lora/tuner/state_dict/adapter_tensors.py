"""The tensors of an adapter by their keys in a checkpoint, and checks of their values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from moe_lora.routing.offloading import offload_groups
from moe_lora.tuner.expert_parameters import ExpertParameters
from moe_lora.tuner.state_dict.module_paths import bare_modules, bare_path, join_path

EXPERTS, ROUTERS = "moe_lora_experts", "moe_lora_routers"


def adapter_tensors(
    model: nn.Module, adapter_name: str, *, joined: bool = True
) -> dict[str, Tensor]:
    """Return an adapter's own parameters and buffers, by their keys in a checkpoint.

    Args:
        model: the module with the injected adapter, or a `PeftModel`.
        adapter_name: the adapter.
        joined: join the trained and the frozen part of a factor; false returns the parameters
            themselves, under keys that a checkpoint does not have.
    """
    found: dict[str, Tensor] = {}
    for _, bare, module in bare_modules(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            state = module.state_dict(keep_vars=True)
            names = module.adapter_state_dict_load_map(adapter_name)
            found |= {
                join_path(bare, bare_path(name)): state[inner] for name, inner in names.items()
            }
    for _, bare, module in parts_of_adapter(model, adapter_name):
        state = module.state_dict(keep_vars=True)
        if joined and isinstance(module, ExpertParameters):
            state = module.join_state(state)
        for name, tensor in state.items():
            found[f"{bare}.{bare_path(name)}"] = tensor
    return found


def parts_of_adapter(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield the experts of every layer, and the router, each with path and bare path.

    Args:
        model: the module with the injected adapter, or a `PeftModel`.
        adapter_name: the adapter.

    Yields:
        Path, bare path and module; the paths are without the adapter's name.
    """
    for path, bare, module in bare_modules(model):
        for attribute in (EXPERTS, ROUTERS):
            by_name = module._modules.get(attribute)
            if isinstance(by_name, nn.ModuleDict) and adapter_name in by_name:
                yield join_path(path, attribute), join_path(bare, attribute), by_name[adapter_name]


def check_in_memory(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check that the values of tensors are in memory, not offloaded or sharded.

    Args:
        model: the model, with its offloading hooks.
        tensors: parameters and buffers of the model (not copies, not detached) by name.

    Raises:
        ValueError: for a tensor that is on the meta device, on disk, sharded or empty.
    """
    on_disk = {id(tensor) for tensor in _offloaded_to_disk(model)}
    for name, tensor in tensors.items():
        is_factor = ".lora_A" in name or ".lora_B" in name
        if tensor.is_meta:
            where = "is on the meta device"
        elif id(tensor) in on_disk:
            where = "is offloaded to disk"
        elif (
            hasattr(tensor, "full_tensor") or tensor.numel() == 0 or (is_factor and tensor.ndim < 3)
        ):
            where = "is sharded over processes"
        else:
            continue
        raise ValueError(
            f"Expected the adapter's weights in memory, but {name!r} {where}. Load or initialize "
            "it, or remove the model's offloading hooks, first; for a sharded model, save the "
            "gathered state dict, as in the guide on several processes."
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Check for NaN and inf, since a checkpoint with these cannot be loaded.

    Args:
        tensors: the tensors by name.

    Raises:
        ValueError: for a tensor with NaN or inf.
    """
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"Expected finite weights, but {len(broken)} of {len(tensors)} tensors have NaN or "
            f"inf, such as {broken[0]!r}. Nothing was written. Continue from an earlier checkpoint."
        )


def check_not_on_disk(model: nn.Module) -> None:
    """Check that the weights of a model can be read and changed outside of its forward pass.

    Args:
        model: the model, with its offloading hooks.

    Raises:
        ValueError: when diffusers' group offloading has weights on disk.
    """
    if is_offloaded_to_disk(model):
        raise ValueError(
            f"Expected the weights of {type(model).__name__} in memory, but some are offloaded to "
            "disk. Merge or unmerge first, and call `enable_group_offload` afterwards."
        )


def is_offloaded_to_disk(model: nn.Module) -> bool:
    """Return whether diffusers' group offloading has any of a model's weights on disk.

    Args:
        model: the model, with its offloading hooks.
    """
    return next(_offloaded_to_disk(model), None) is not None


def _offloaded_to_disk(model: nn.Module) -> Iterator[Tensor]:
    # The tensors of an offloaded group are uninitialized memory; on a CPU, the group does not
    # record when it is offloaded.
    for group in offload_groups(model.modules()):
        if group.offload_to_disk_path is not None:
            yield from group.tensor_to_key
