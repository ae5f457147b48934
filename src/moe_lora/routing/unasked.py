"""Data-parallel training in a phase that asks no router.

`DistributedDataParallel` waits for a gradient of every parameter that it was built with, and the
router's would never come. So inside its forward pass a router that is not asked takes part in the
graph all the same, with zero gradients, and after the backward pass has `None` for them again, as
in a single process: an optimizer that is given zeros decays the weights and its second moments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel


class _Unasked(torch.autograd.Function):
    """Pass weights on, and give parameters zero gradients that do not outlast the backward pass."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        fresh = [p for p in ctx.parameters if p.grad is None]
        # What is queued by a queued function runs after all else that the backward pass has queued,
        # and so after the reduction over the processes.
        queue = Variable._execution_engine.queue_callback
        queue(lambda: queue(lambda: _forget_zeros(fresh)))
        return (grads[0], *[torch.zeros_like(p) for p in ctx.parameters])


def is_awaited(router: nn.Module) -> bool:
    """Tell whether a `DistributedDataParallel` that is running awaits gradients of a router."""
    if not torch.is_grad_enabled() or DistributedDataParallel._get_active_ddp_module() is None:
        return False
    return any(parameter.requires_grad for parameter in router.parameters())


def hold(router: nn.Module, weights: Tensor) -> Tensor:
    """Return routing weights unchanged, in a graph that holds a router which did not decide them.

    Args:
        router: the router that is not asked.
        weights: any routing weights.
    """
    parameters = [p for p in router.parameters() if p.requires_grad]
    held: Tensor = _Unasked.apply(weights, *parameters)  # type: ignore[no-untyped-call]
    return held


def _forget_zeros(parameters: list[nn.Parameter]) -> None:
    # Another pass, or another process, may have asked the router: such gradients stay.
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads and not torch.stack([grad.any() for grad in grads]).any():
        for parameter in parameters:
            parameter.grad = None
