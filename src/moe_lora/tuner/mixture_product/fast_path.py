"""Conditions for the fused path of a layer, under which it equals the plain formula."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from moe_lora.tracing import PLAIN_TYPES, dispatch_modes, is_transformed

_function_modes = torch._C._len_torch_function_stack  # PyTorch offers no public name for it


def _unless_patched(function: Any) -> Any:
    """Return the function if it is PyTorch's own, `None` if it was patched."""
    code = getattr(function, "__code__", None)
    return function if code and code.co_filename.startswith(torch.__path__[0]) else None


_MODULE_CALL = _unless_patched(nn.Module.__call__)
_LINEAR_FORWARD = _unless_patched(nn.Linear.forward)
_LINEAR = F.linear


def can_fuse(*operands: Tensor | None) -> bool:
    """Return whether the fused function may replace the plain operations.

    It may not when operations are transformed (see `is_transformed`), when a dispatch mode or a
    function mode intercepts them (a FLOP counter, a policy of selective checkpointing), when an
    operand is a tensor subclass or a proxy, or when `F.linear` was replaced.

    Args:
        operands: the tensors of the operation.
    """
    for operand in operands:
        if operand is not None and type(operand) not in PLAIN_TYPES:
            return False
    return not (
        is_transformed()
        or dispatch_modes()
        or (_function_modes() and _has_function_mode())
        or F.linear is not _LINEAR
    )


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a layer is a frozen `nn.Linear` whose call is `F.linear` alone.

    It is not when the layer or all modules have hooks, or when the layer's `forward`,
    `nn.Linear.forward` or `nn.Module.__call__` was replaced.

    Args:
        layer: any module.
    """
    if (
        type(layer) is not nn.Linear
        or _has_any_global_hook()
        or nn.Linear.forward is not _LINEAR_FORWARD
        or nn.Linear.__call__ is not _MODULE_CALL
    ):
        return False
    own = layer.__dict__  # reading parameters through `nn.Module.__getattr__` takes microseconds
    weight, bias = (own["_parameters"].get(name) for name in ("weight", "bias"))
    if type(weight) is not nn.Parameter or weight.requires_grad:
        return False
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    patched = "forward" in own or "_call_impl" in own or own.get("_compiled_call_impl") is not None
    trained = bias is not None and bias.requires_grad
    return not (hooked or own["_backward_pre_hooks"] or patched or trained)


def _has_function_mode() -> bool:
    """Return whether a function mode other than the default device is active."""
    modes = (torch._C._get_function_stack_at(i) for i in range(_function_modes()))
    return any(type(mode) is not DeviceContext for mode in modes)
