"""Parameters and optimizer states that DeepSpeed's ZeRO stages 2 and 3 spread over processes.

Each process has a part of one flat vector per group of parameters. ZeRO steps all parameters
together, so that all have the same count of steps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from training_run.optimizers import innermost


def uses_zero(model: nn.Module) -> bool:
    """Tell whether DeepSpeed trains a model, which is unwrapped."""
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters())


def gather_weight(parameter: Tensor) -> Tensor:
    """Return a whole parameter of ZeRO-3; called by every process."""
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def gather_zero_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the state of an optimizer as `key/parameter`; called by every process."""
    states = [state for state in innermost(optimizer).state.values() if state]
    if not states:
        return {}
    keys = sorted(states[0].keys() - {"step"})  # the same order in all processes
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        for key in keys:
            tensors[f"{key}/{name}"] = _gather(optimizer, parameter, key).cpu()
        if "step" in states[0]:
            tensors[f"step/{name}"] = states[0]["step"].cpu().clone()
    return tensors


def load_zero_state(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the state that `gather_zero_state`, or a run without DeepSpeed, returned."""
    parameters = dict(model.named_parameters())
    entries: list[tuple[str, str, Tensor]] = []
    for entry, value in tensors.items():
        key, _, name = entry.partition("/")
        entries.append((key, name, value))
    steps = [value for key, _, value in entries if key == "step"]
    keys = {key for key, _, _ in entries} - {"step"}
    inner = innermost(optimizer)
    for flat in _flat_vectors(optimizer):  # ZeRO allocates the state at the first step
        inner.state[flat] = {key: torch.zeros_like(flat) for key in keys}
        if steps:
            inner.state[flat]["step"] = max(steps).clone()
    for key, name, value in entries:
        parameter = parameters.get(name)
        if key != "step" and parameter is not None and parameter.requires_grad:
            _scatter(optimizer, parameter, key, value)


def _flat_vectors(optimizer: Any) -> list[Tensor]:
    """Return this process's part of the parameters of each group."""
    of_stage_3 = getattr(optimizer.optimizer, "fp32_partitioned_groups_flat", None)
    if of_stage_3 is not None:
        return list(of_stage_3)
    return [p for group in innermost(optimizer).param_groups for p in group["params"]]


def _gather(optimizer: Optimizer, parameter: Any, key: str) -> Tensor:
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key).clone()
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    for mine, ours in _parts(optimizer, parameter, key, whole):
        mine.copy_(ours)
    dist.all_reduce(whole)
    return whole.view_as(parameter)


def _scatter(optimizer: Optimizer, parameter: Any, key: str, value: Tensor) -> None:
    value = value.to(parameter.device)
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

        size = safe_get_local_optimizer_state(parameter, key).numel()
        padded = nn.functional.pad(value.flatten(), (0, size * dist.get_world_size()))
        part = padded.narrow(0, size * dist.get_rank(), size)
        safe_set_local_optimizer_state(parameter, part, key)
        return
    for mine, ours in _parts(optimizer, parameter, key, value.flatten()):
        ours.copy_(mine)


def _parts(
    optimizer: Optimizer, parameter: Any, key: str, whole: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return views of the same numbers in a whole tensor and in the flat state of ZeRO-2."""
    mapping = parameter._hp_mapping
    if mapping is None:  # another process has all of them
        return []
    inner = innermost(optimizer)
    (flat,) = inner.param_groups[mapping.param_group_index]["params"]
    here, there = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    state = inner.state[flat][key]
    return [(whole.narrow(0, here.start, here.numel), state.narrow(0, there.start, there.numel))]
