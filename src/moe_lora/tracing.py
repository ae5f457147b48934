"""Detection of tracing and transforms, under which tensors have no readable values."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# PyTorch offers no public names for these.
dispatch_modes = torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack
_is_of_legacy_vmap = torch._C._functorch.is_legacy_batchedtensor  # of `is_grads_batched=True`
_is_jit_tracing = torch._C._is_tracing
_SYMBOLIC_MODES = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)
PLAIN_TYPES = (Tensor, nn.Parameter)


def is_transformed() -> bool:
    """Return whether operations are traced or transformed.

    That is the case under `torch.compile`, `torch.export`, `torch.jit.trace`, the transforms of
    `torch.func`, forward-mode differentiation, `make_fx` and `FakeTensorMode`. Tensors may then
    have no readable values, and custom `torch.autograd.Function`s cannot be called.
    """
    return (
        torch.compiler.is_compiling()
        or _transform() is not None
        or forward_ad._current_level >= 0
        or _is_jit_tracing()
        or (
            dispatch_modes() > 0
            and any(torch._C._get_dispatch_mode(key) is not None for key in _SYMBOLIC_MODES)
        )
    )


def has_plain_values(tensor: Tensor) -> bool:
    """Return whether a tensor is of PyTorch's own type and not traced, dual or batched."""
    return type(tensor) in PLAIN_TYPES and not is_transformed() and not _is_of_legacy_vmap(tensor)
