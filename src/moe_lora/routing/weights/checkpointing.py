"""Activation checkpointing: a block that runs again must be routed as it was the first time.

In the backward pass of a routed model, `RoutingContext.restore_in_backward` brings the routing of
the pass back. What is here covers the rest: a guard that raises where the routing of another pass
was found, and a checkpointing function that keeps the routing by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_lora.routing.weights.context import RoutingContext
from moe_lora.routing.weights.routing import Routing, graph_task


class RoutedCheckpoint:
    """Make a checkpointing function recompute with the routing of its own forward pass.

    Args:
        checkpoint: the function to wrap, called as `checkpoint(function, *args, **kwargs)`, for
            example `torch.utils.checkpoint.checkpoint`.
        context: the context of the model whose blocks are checkpointed.
    """

    def __init__(self, checkpoint: Callable[..., Any], context: RoutingContext) -> None:
        self.checkpoint = checkpoint
        self.context = context

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        routing = self.context.current()

        def run(*inputs: Any, **named: Any) -> Any:
            with self.context.use(routing):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)


def version_in_graph(routing: Routing) -> Tensor | None:
    """Return what a layer's graph keeps, so that it refuses gradients under another routing.

    Args:
        routing: what the layer is routed by.

    Returns:
        The routing's version; `None` where no graph is made, or where a compiler makes it.

    Raises:
        RuntimeError: when called by a reentrant checkpoint's recomputation of a block whose routing
            weights require gradients.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if routing.requires_grad and _in_reentrant_recomputation(routing):
        raise RuntimeError(
            "Reentrant activation checkpointing cannot carry gradients to routing weights. Pass "
            "use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )
    return routing.version


def check_version(version: Tensor | None, expected: int | None) -> None:
    """Raise when a block was recomputed under another routing than it was run with.

    The node of the graph is made by the forward pass, while a checkpointed block's saved tensors
    come from the recomputation.

    Args:
        version: the routing's version as the graph saved it.
        expected: the version at the time of the forward pass.

    Raises:
        RuntimeError: when they differ.
    """
    if version is not None and int(version) != expected:
        raise RuntimeError(
            "A checkpointed block was recomputed with the routing weights of another forward "
            "pass, so its gradients would be wrong. Checkpoint the model's blocks (not the whole "
            "model) with moe_lora.routing.routed_checkpoint(model), which keeps its weights, "
            "or run backward before the next forward pass."
        )


def recomputed(routing: Routing, before: Routing) -> Routing:
    """Return the routing of a pass that begins in the backward pass of another.

    Where the whole model is checkpointed, it is the same pass, computed again.

    Args:
        routing: what was decided now.
        before: the routing of the pass whose backward pass runs.

    Returns:
        The routing, under the version of the earlier one if both are equal.

    Raises:
        RuntimeError: when a checkpoint computes the pass again under another routing.
    """
    if routing.equals(before):
        return replace(routing, version=before.version)
    if _in_checkpoint():
        raise RuntimeError(
            "A checkpointed call of the routed model was computed again under other routing "
            "weights, so its gradients would be wrong. Leave modes, router inputs and moe_lora's "
            "contexts as they were until the backward pass is over, or checkpoint the model's "
            "blocks instead."
        )
    return routing


class _Versioned(torch.autograd.Function):
    """Pass a tensor on, in a graph that checks its routing's version on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, version: Tensor) -> Tensor:
        ctx.version = int(version)
        ctx.save_for_backward(version)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        check_version(ctx.saved_tensors[0], ctx.version)
        return grads[0], None


def guarded(x: Tensor, version: Tensor | None) -> Tensor:
    """Return `x` unchanged, in a graph that calls `check_version` in its backward pass."""
    if version is None:
        return x
    versioned: Tensor = _Versioned.apply(x, version)  # type: ignore[no-untyped-call]
    return versioned


def _in_reentrant_recomputation(routing: Routing) -> bool:
    # Both kinds of checkpoint recompute inside the backward pass; only the non-reentrant kind does
    # so under saved-tensor hooks of its own. A pass that began inside it recomputes nothing.
    return graph_task() not in (-1, routing.graph_task) and not _in_checkpoint()


def _in_checkpoint() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
