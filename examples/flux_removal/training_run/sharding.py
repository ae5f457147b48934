"""Whole tensors of models and optimizers that processes share, with FSDP2 or DeepSpeed."""

from __future__ import annotations

from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a process holds parts of the parameters only, as under FSDP2 and ZeRO-3."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def gather(value: Tensor) -> Tensor:
    """Return a whole tensor on the CPU; called by every process.

    Args:
        value: a parameter, or a tensor of an optimizer's state; the value of a parameter under
            ZeRO is that of the optimizer, in float32.
    """
    whole = value.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    elif hasattr(value, "ds_id"):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([value]):
            whole = value.detach().clone()
    return whole.cpu().contiguous()


def scatter(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, laid out as a parameter is."""
    value = value.to(like.device)
    if isinstance(value, DTensor):
        return value
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value, like.device_mesh, like.placements)
    return value


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model's checkpoint holds, with whole tensors; called by every process.

    Args:
        model: unwrapped, adapted by PEFT or trained whole.
    """
    part = model.base_model.prefix if isinstance(model, PeftModel) else ""
    return {name: gather(v) for name, v in _state(model).items() if part in name}


def _state(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())  # a state dict loses what ZeRO adds to parameters
    return {name: parameters.get(name, v) for name, v in model.state_dict().items()}
