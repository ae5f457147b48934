"""Activation checkpointing: the recomputation of a block uses the routing of its forward pass.

In the backward pass of a routed model, `RoutingContext.restore_in_backward` restores the routing of
the pass. This module covers the other cases: a check that raises where a block was recomputed with
the routing of another pass, and a checkpointing function that stores the routing.
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
    """Checkpointing function that recomputes with the routing of its own forward pass.

    Args:
        checkpoint: the function to wrap, called as `checkpoint(function, *args, **kwargs)`, for
            example `torch.utils.checkpoint.checkpoint`.
        context: the context of the model with the checkpointed blocks.
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


def version_to_save(routing: Routing) -> Tensor | None:
    """Return the routing version that a layer saves in its graph for `check_version`.

    Args:
        routing: the routing of the layer.

    Returns:
        The routing's version; `None` without a graph, or while compiling.

    Raises:
        RuntimeError: in the recomputation of a reentrant checkpoint, when the routing weights
            require gradients.
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
    """Raise when a block was recomputed with a different routing than in its forward pass.

    The forward pass creates the node of the graph; the saved tensors of a checkpointed block come
    from the recomputation.

    Args:
        version: the routing version among the saved tensors.
        expected: the routing version in the forward pass.

    Raises:
        RuntimeError: when the versions differ.
    """
    if version is not None and int(version) != expected:
        raise RuntimeError(
            "A checkpointed block was recomputed with the routing weights of another forward "
            "pass, so its gradients would be wrong. Checkpoint the model's blocks (not the whole "
            "model) with moe_lora.routing.routed_checkpoint(model), which stores the weights, "
            "or run backward before the next forward pass."
        )


def match_recomputed(routing: Routing, original: Routing) -> Routing:
    """Return the routing of a pass that begins inside the backward pass of another.

    When the whole model is checkpointed, the new pass is the recomputation of the other one.

    Args:
        routing: the routing of the new pass.
        original: the routing of the pass whose backward pass is running.

    Returns:
        The routing, with the version of the original if both are equal.

    Raises:
        RuntimeError: when a checkpoint recomputes the pass with a different routing.
    """
    if routing.equals(original):
        return replace(routing, version=original.version)
    if _in_checkpoint():
        raise RuntimeError(
            "A checkpointed call of the routed model was recomputed with other routing weights, so "
            "its gradients would be wrong. Leave modes, router inputs and moe_lora's contexts "
            "unchanged until the backward pass is over, or checkpoint the model's blocks instead."
        )
    return routing


class _VersionCheck(torch.autograd.Function):
    """Identity whose backward pass checks the routing version."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, version: Tensor) -> Tensor:
        ctx.version = int(version)
        ctx.save_for_backward(version)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        check_version(ctx.saved_tensors[0], ctx.version)
        return grads[0], None


def check_version_in_backward(x: Tensor, version: Tensor | None) -> Tensor:
    """Return `x` unchanged, in a graph that calls `check_version` in its backward pass."""
    if version is None:
        return x
    versioned: Tensor = _VersionCheck.apply(x, version)  # type: ignore[no-untyped-call]  # untyped in torch
    return versioned


def _in_reentrant_recomputation(routing: Routing) -> bool:
    # Both kinds of checkpoint recompute inside the backward pass, but only the non-reentrant kind
    # installs saved-tensor hooks. A pass that began inside the backward pass recomputes nothing.
    return graph_task() not in (-1, routing.graph_task) and not _in_checkpoint()


def _in_checkpoint() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
