"""Activation checkpointing: a block that runs again must be routed as it was the first time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.handover import WeightSlot


class RoutedCheckpoint:
    """Make a checkpointing function recompute with the weights of its own forward pass.

    By the time of the backward pass another forward pass may have put other weights into the slot.

    Args:
        checkpoint: the function to wrap, called as `checkpoint(function, *args, **kwargs)`, for
            example `torch.utils.checkpoint.checkpoint`.
        slot: the slot of the model whose blocks are checkpointed.
    """

    def __init__(self, checkpoint: Callable[..., Any], slot: WeightSlot) -> None:
        self.checkpoint = checkpoint
        self.slot = slot

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        snapshot = self.slot.snapshot()

        def run(*inputs: Any, **named: Any) -> Any:
            with self.slot.restored(snapshot):
                return function(*inputs, **named)

        return self.checkpoint(run, *args, **kwargs)


def wrap_checkpointing(model: nn.Module, slot: WeightSlot) -> None:
    """Wrap the checkpointing functions that diffusers and transformers set on their modules."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, RoutedCheckpoint):
                routed = RoutedCheckpoint(checkpoint, slot)
                object.__setattr__(module, "_gradient_checkpointing_func", routed)


def stamp_of(slot: WeightSlot) -> Tensor | None:
    """Return what a layer's graph keeps, so that it refuses gradients under another routing.

    Args:
        slot: the slot that the layer's weights come from.

    Returns:
        The slot's stamp; `None` where no graph is made, or where a compiler makes it.

    Raises:
        RuntimeError: when called by a reentrant checkpoint's recomputation of a routed block.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if slot.weights and _in_reentrant_recomputation():
        raise RuntimeError(
            "Reentrant activation checkpointing cannot carry gradients to routing weights. Pass "
            "use_reentrant=False to torch.utils.checkpoint.checkpoint."
        )
    return slot.stamp


def check_stamp(stamp: Tensor | None, expected: int | None) -> None:
    """Raise when a block was recomputed under another routing than it was run with.

    The node of the graph is made by the forward pass, while a checkpointed block's saved tensors
    come from the recomputation.

    Args:
        stamp: the routing's stamp as the graph saved it.
        expected: the stamp at the time of the forward pass.

    Raises:
        RuntimeError: when they differ.
    """
    if stamp is not None and int(stamp) != expected:
        raise RuntimeError(
            "A checkpointed block was recomputed with the routing weights of a later forward "
            "pass, so its gradients would be wrong. Run backward before the next forward "
            "pass, or checkpoint with moe_lora.routed_checkpoint(model), which keeps the "
            "weights of each pass."
        )


class _Stamped(torch.autograd.Function):
    """Pass a tensor on, in a graph that checks its stamp on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stamp: Tensor) -> Tensor:
        ctx.stamp = int(stamp)
        ctx.save_for_backward(stamp)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        check_stamp(ctx.saved_tensors[0], ctx.stamp)
        return grads[0], None


def guarded(x: Tensor, stamp: Tensor | None) -> Tensor:
    """Return `x` unchanged, in a graph that calls `check_stamp` in its backward pass."""
    if stamp is None:
        return x
    stamped: Tensor = _Stamped.apply(x, stamp)  # type: ignore[no-untyped-call]
    return stamped


def _in_reentrant_recomputation() -> bool:
    # Both kinds of checkpoint recompute inside the backward pass; only the non-reentrant kind does
    # so under saved-tensor hooks of its own.
    in_backward: bool = torch._C._current_graph_task_id() != -1
    return in_backward and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
