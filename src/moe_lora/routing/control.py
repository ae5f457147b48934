"""What a training loop calls to steer the routing of an adapted model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from moe_lora.masks import MaskInfo
from moe_lora.masks.validation import check_size
from moe_lora.routing.inputs import GivenInputs
from moe_lora.routing.lookup import ROUTER_ATTRIBUTE, active_adapters, routed_module, routing_state
from moe_lora.routing.model_call.mask_cache import analyze_as_given
from moe_lora.routing.routers.base import Router, RoutingDecision
from moe_lora.routing.state import RoutingMode, RoutingState
from moe_lora.routing.statistics import RoutingStats
from moe_lora.routing.steering import Override, check_override
from moe_lora.routing.weights.checkpointing import RoutedCheckpoint

Value = TypeVar("Value")


class HasSpecializedLosses(Protocol):
    """Describe a loss that knows whether any of its specialized components is on."""

    @property
    def specialized(self) -> bool: ...


@contextmanager
def route(model: nn.Module, weights: Tensor, *, top_k: int | None = None) -> Iterator[None]:
    """Use given routing weights inside the context: in every call of the model, and of its blocks.

    It acts in the thread, or asynchronous task, that opened it.

    Args:
        model: the adapted model, or a wrapper around it.
        weights: `(E,)`, `(B, E)` or `(B, T, E)`; rows should sum to 1. Gradients reach them. With
            `B` = 1 one row serves all samples.
        top_k: how many weights of a row differ from 0 at most. With `(B, E)` weights the other
            experts are then not computed, and no gradient reaches their weights.

    Raises:
        TypeError: for weights that are not a floating-point tensor.
        ValueError: for weights of another shape, more than `top_k` that differ from 0, or a model
            without an adapter.
    """
    check_override(weights, top_k)
    state = routing_state(model)
    state.check_num_experts("weights", weights, active_adapters(model))
    with state.steered(override=Override.of(weights, top_k)):
        yield


@contextmanager
def teach_experts(model: nn.Module, expert_grad_mask: Tensor) -> Iterator[None]:
    """Let every sample's gradient reach the parameters of some experts only.

    The mixture computes what it always does, and gradients pass through it to everything else, the
    router included. The passes of the context remember it: their backward may follow later. It acts
    in the thread, or asynchronous task, that opened it.

    Args:
        model: the adapted model, or a wrapper around it.
        expert_grad_mask: `(B, E)`, 1 where a sample trains an expert and 0 where not.

    Raises:
        ValueError: for a tensor of another shape or with other values, or a model without an
            adapter.
    """
    if expert_grad_mask.ndim != 2:
        raise ValueError(
            "Expected `expert_grad_mask` to have shape (batch, E), but got "
            f"{tuple(expert_grad_mask.shape)}."
        )
    state = routing_state(model)
    state.check_num_experts("expert_grad_mask", expert_grad_mask, active_adapters(model))
    expert_grad_mask = expert_grad_mask.detach().float()
    if not ((expert_grad_mask == 0) | (expert_grad_mask == 1)).all():
        raise ValueError("Expected `expert_grad_mask` to be 0 or 1, but got other values.")
    with state.steered(expert_grad_mask=expert_grad_mask):
        yield


def set_routing_mode(model: nn.Module, mode: RoutingMode) -> None:
    """Choose between the router's weights and fixed uniform ones.

    Args:
        model: the adapted model, or a wrapper around it.
        mode: "routed", or "uniform" for 1/E without a router call and without a gate product. It
            is saved with the adapters.

    Raises:
        ValueError: for an unknown mode, or for "routed" on a model without a router.
    """
    routers = getattr(routed_module(model), ROUTER_ATTRIBUTE)
    routers.state.set_mode(mode)
    for config in routers.configs.values():
        if hasattr(config, "routing_mode"):
            config.routing_mode = mode


def routing_mode_for(losses: HasSpecializedLosses) -> RoutingMode:
    """Return the mode that suits a loss: routed when a specialized component is on, else uniform.

    Args:
        losses: a `RemovalLoss`, or anything with a property `specialized`.
    """
    return "routed" if losses.specialized else "uniform"


def set_router_inputs(
    model: nn.Module,
    *,
    mask: Tensor | None = None,
    image: Tensor | None = None,
    mask_info: MaskInfo | None = None,
    task_hint: str | None = None,
    grid_size: tuple[int, int] | None = None,
    timestep_range: tuple[float, float] | None = None,
) -> None:
    """Give the router inputs that the model's own call does not carry, until the next call of this.

    They hold for all threads; `router_inputs` gives them to one. Arguments that are left out are
    cleared: `set_router_inputs(model)` clears all. Tensors are copied, so that later changes in
    place have no effect.

    Args:
        model: the adapted model, or a wrapper around it.
        mask: `(B, 1, H, W)` or `(1, 1, H, W)`, in [0, 1], pixel space; 1 = remove. Also one per
            sample of a batch that guidance repeats. Copied without its graph.
        image: `(B, 3, H, W)`, in [0, 1]; with it the mask's `detail_complexity` is known. Read
            without its graph.
        mask_info: an already analyzed mask, instead of `mask` and `image`. Gradients reach it, so
            that one with a graph serves one backward pass.
        task_hint: `<expert>_focus` or `<expert>_only`, for example "removal_focus".
        grid_size: `(rows, columns)` of the model's image tokens.
        timestep_range: the timesteps of clean data and of pure noise, as the caller counts them;
            by default those of the model's family.

    Raises:
        ValueError: for a mask given twice, an image without a mask, an unknown hint, a grid that is
            not two integers >= 1, or a range that is not two different finite numbers.
    """
    state = routing_state(model)
    given = (mask, image, mask_info, task_hint, grid_size, timestep_range)
    state.given = _given(state, *given)


@contextmanager
def router_inputs(
    model: nn.Module,
    *,
    mask: Tensor | None = None,
    image: Tensor | None = None,
    mask_info: MaskInfo | None = None,
    task_hint: str | None = None,
    grid_size: tuple[int, int] | None = None,
    timestep_range: tuple[float, float] | None = None,
) -> Iterator[None]:
    """Give the router inputs that the model's own call does not carry, inside the context.

    Unlike `set_router_inputs`, it acts in this thread (or asynchronous task) only, so that requests
    that share a model do not see each other's masks. It replaces all inputs that were given outside
    of it, and restores them at its end. The arguments are those of `set_router_inputs`.

    Raises:
        ValueError: as `set_router_inputs`.
    """
    state = routing_state(model)
    given = _given(state, mask, image, mask_info, task_hint, grid_size, timestep_range)
    with state.steered(given=given):
        yield


def _given(
    state: RoutingState,
    mask: Tensor | None,
    image: Tensor | None,
    mask_info: MaskInfo | None,
    task_hint: str | None,
    grid_size: tuple[int, int] | None,
    timestep_range: tuple[float, float] | None,
) -> GivenInputs:
    if mask is not None and mask_info is not None:
        raise ValueError("Expected one of `mask` and `mask_info`, but got both.")
    if image is not None and mask is None:
        raise ValueError("Expected `mask` together with `image`, but got none.")
    state.check_hint(task_hint)
    if grid_size is not None:
        grid_size = check_size(grid_size, "grid_size")
    if timestep_range is not None:
        timestep_range = _check_timestep_range(timestep_range)
    if mask is not None:
        mask_info = analyze_as_given(mask, image)
    elif mask_info is not None:
        with torch.inference_mode(False):
            mask_info = mask_info.copy()
    return GivenInputs(mask_info, task_hint, grid_size, timestep_range)


def attach_router(model: nn.Module, router: Router, adapter_name: str = "default") -> None:
    """Put a router into an adapted model, in the place of any other.

    The adapter's strategy, temperature and `top_k` apply. Build the optimizer afterwards: the
    router's parameters are new to it.

    Args:
        model: the adapted model, or a wrapper around it.
        router: any `Router`.
        adapter_name: whose router it becomes.

    Raises:
        TypeError: when `router` is no `Router`, or was built with arguments that no checkpoint can
            hold.
        ValueError: when the adapter does not exist.
    """
    if not isinstance(router, Router):
        raise TypeError(f"Expected `router` to be a moe_lora.Router, but got {type(router)}.")
    try:
        json.dumps(router.init_kwargs)
    except TypeError as error:
        raise TypeError(
            f"Expected {type(router).__name__} to be built with JSON values, which a checkpoint "
            f"can hold, but got {router.init_kwargs}."
        ) from error
    module = routed_module(model)
    router.train(module.training)
    getattr(module, ROUTER_ATTRIBUTE).attach(adapter_name, router)


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> tuple[str, ...]:
    """List the paths of the layers that an adapter adapts, in the order of weights per layer.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: whose layers.

    Raises:
        ValueError: when the adapter does not exist.
    """
    return _of(routing_state(model).layer_names, adapter_name)


def routing_stats(model: nn.Module, adapter_name: str = "default") -> RoutingStats:
    """Return what an adapter's router decided since the statistics were last reset.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: whose router.

    Raises:
        ValueError: when the adapter does not exist.
    """
    return _of(routing_state(model).stats, adapter_name)


def current_routing(model: nn.Module, adapter_name: str = "default") -> RoutingDecision | None:
    """Return weights and logits of this thread's last pass, with gradient, for auxiliary losses.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: whose router.

    Returns:
        The decision, or `None` when the last pass asked no router.
    """
    return routing_state(model).in_thread.decisions.get(adapter_name)


def routed_checkpoint(
    model: nn.Module, checkpoint: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Make an activation-checkpointing function that recomputes with the right routing.

    Losses on the model's output need no call of this, whatever checkpoints its blocks. It is for
    losses on inner features alone, which raise without it. Compiled blocks are guarded less: an
    inner feature of one pass, in one backward pass with the output of a later pass, gets a wrong
    gradient without an error.

    Args:
        model: the adapted model, or a wrapper around it.
        checkpoint: the function to wrap; `torch.utils.checkpoint.checkpoint` by default, whose
            keyword arguments (`use_reentrant=False`) are the caller's to give.
    """
    return RoutedCheckpoint(checkpoint or torch_checkpoint, routing_state(model))


def _check_timestep_range(timestep_range: tuple[float, float]) -> tuple[float, float]:
    numbers = [n for n in timestep_range if isinstance(n, int | float) and math.isfinite(n)]
    if len(timestep_range) != 2 or len(numbers) != 2 or numbers[0] == numbers[1]:
        raise ValueError(
            "Expected `timestep_range` to be two different finite numbers (clean, noise), but got "
            f"{timestep_range}."
        )
    return float(numbers[0]), float(numbers[1])


def _of(known: dict[str, Value], adapter_name: str) -> Value:
    if adapter_name not in known:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(known)}, but got {adapter_name!r}."
        )
    return known[adapter_name]
