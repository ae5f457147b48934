"""The state of any optimizer by names of parameters, as tensors and JSON."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from options.optimizer_names import constructor_arguments
from training_run.optimizers import innermost
from training_run.sharding import gather, scatter
from training_run.zero import gather_zero_state, load_zero_state, uses_zero

OF_A_ROUTER = re.compile(r"(^|\.)moe_router\.")
"""The names of a router's parameters, in models and in files."""


def name_of(optimizer: Optimizer) -> str:
    """Return the package and class of an optimizer."""
    kind = type(innermost(optimizer))
    return f"{kind.__module__.partition('.')[0]}.{kind.__name__}"


def save_state(optimizer: Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of an optimizer; called by every process.

    Args:
        optimizer: the run's.
        model: the unwrapped model, whose parameters it trains.

    Returns:
        Whole tensors as `key/parameter`, and everything else as JSON: `scalars` by key and
        parameter, and `groups` by name, with what the optimizer itself added to its groups.
    """
    zero = uses_zero(model)
    tensors = gather_zero_state(optimizer, model) if zero else {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in [] if zero else model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}/{name}"] = gather(value)
            else:
                scalars.setdefault(key, {})[name] = value
    groups = {group["name"]: _own_entries(optimizer, group) for group in optimizer.param_groups}
    entries = {"name": name_of(optimizer), "scalars": scalars, "groups": groups}
    return _without_shared_memory(tensors), entries


def load_state(
    optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor], entries: dict[str, Any]
) -> None:
    """Load what `save_state` returned.

    Parameters that are not in it keep a fresh state. That of a router which the model does not have
    is left out.

    Raises:
        ValueError: for the state of another optimizer.
    """
    name = name_of(optimizer)
    if entries.get("name", name) != name:
        raise ValueError(
            f"Expected the optimizer of the checkpoint, {entries['name']}, but got {name}. Resume "
            "with the same `optimizer`."
        )
    if uses_zero(model):
        load_zero_state(optimizer, model, tensors)
        return
    parameters = dict(model.named_parameters())
    on_device = {
        id(p)
        for group in optimizer.param_groups
        if group.get("capturable") or group.get("fused")
        for p in group["params"]
    }
    for entry, tensor in tensors.items():
        key, _, place = entry.partition("/")
        if place not in parameters and OF_A_ROUTER.search(place):
            continue
        parameter = parameters[place]
        # As in torch, which counts steps on the CPU.
        stays = key == "step" and id(parameter) not in on_device
        optimizer.state[parameter][key] = tensor if stays else scatter(tensor, parameter)
    for key, values in entries.get("scalars", {}).items():
        for place, value in values.items():
            if place in parameters or not OF_A_ROUTER.search(place):
                optimizer.state[parameters[place]][key] = value
    for group in optimizer.param_groups:
        group.update(entries.get("groups", {}).get(group["name"], {}))


def _own_entries(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Return the state in a group; arguments and the schedule come from the options of the run."""
    given = {"params", "name", "initial_lr", *constructor_arguments(type(innermost(optimizer)))}
    return {
        name: value.item() if isinstance(value, Tensor) else value
        for name, value in group.items()
        if name not in given
    }


def _without_shared_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that parameters share, such as the tables of 8-bit states."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        place = tensor.data_ptr()
        if place in seen:
            tensors[name] = tensor.clone()
        elif tensor.numel():
            seen.add(place)
    return tensors
