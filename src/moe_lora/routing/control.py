"""Control of the routing of an adapted model, for training loops and inference."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from moe_lora.masks import MaskInfo
from moe_lora.masks.validation import check_size
from moe_lora.routing.inputs import GivenInputs
from moe_lora.routing.lookup import ROUTER_ATTRIBUTE, active_adapters, routed_module, routing_state
from moe_lora.routing.model_call.mask_cache import analyze_detached
from moe_lora.routing.routers.base import Router, RoutingDecision
from moe_lora.routing.state import RoutingMode, RoutingState
from moe_lora.routing.statistics import RoutingStats
from moe_lora.routing.steering import Override, check_override
from moe_lora.routing.weights.checkpointing import RoutedCheckpoint

Value = TypeVar("Value")


class HasSpecializedLosses(Protocol):
    """Protocol of a loss with specialized components that can be switched on and off."""

    @property
    def specialized(self) -> bool: ...


@contextmanager
def route(model: nn.Module, weights: Tensor, *, top_k: int | None = None) -> Iterator[None]:
    """Use given routing weights inside the context, in all calls of the model and of its blocks.

    The context affects only the thread or asyncio task that opened it.

    Args:
        model: the adapted model, or a wrapper around it.
        weights: `(E,)`, `(B, E)` or `(B, T, E)`; rows should sum to 1. Gradients reach them. With
            `B` = 1 one row applies to all samples.
        top_k: the maximal number of non-zero weights in a row. With `(B, E)` weights the other
            experts are then not computed, and no gradient reaches their weights.

    Raises:
        TypeError: for weights that are not a floating-point tensor.
        ValueError: for weights of another shape, more than `top_k` non-zero weights in a row, or a
            model without an adapter.
    """
    check_override(weights, top_k)
    state = routing_state(model)
    state.check_num_experts("weights", weights, active_adapters(model))
    with state.steer(override=Override.from_weights(weights, top_k)):
        yield


@contextmanager
def teach_experts(model: nn.Module, expert_grad_mask: Tensor) -> Iterator[None]:
    """Mask, per sample, the gradient of the experts' parameters.

    Neither the output nor any other gradient changes, including that of the router. The mask
    applies to the forward passes inside the context; their backward passes may follow later. The
    context affects only the thread or asyncio task that opened it. Weight decay and momentum change
    experts whose gradient is 0, too; `moe_lora.train_only` freezes them.

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
    with state.steer(expert_grad_mask=expert_grad_mask):
        yield


def set_routing_mode(model: nn.Module, mode: RoutingMode) -> None:
    """Choose between the router's weights and uniform weights.

    Args:
        model: the adapted model, or a wrapper around it.
        mode: "routed", or "uniform" for 1/E without a router call and without a gate product. The
            mode is saved with the adapters.

    Raises:
        ValueError: for an unknown mode, or for "routed" on a model without a router.
    """
    routers = getattr(routed_module(model), ROUTER_ATTRIBUTE)
    routers.state.set_mode(mode)
    for config in routers.configs.values():
        if hasattr(config, "routing_mode"):
            config.routing_mode = mode


def routing_mode_for(losses: HasSpecializedLosses) -> RoutingMode:
    """Return the mode for a loss: routed if a specialized component is on, else uniform.

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
    task_hint: str | Sequence[str | None] | None = None,
    grid_size: tuple[int, int] | None = None,
    timestep_range: tuple[float, float] | None = None,
) -> None:
    """Set router inputs that the model's own call does not contain, until the next call of this.

    The inputs apply to all threads; `router_inputs` sets them for one. Omitted arguments are
    cleared: `set_router_inputs(model)` clears all. Tensors are copied, so that later in-place
    changes have no effect.

    Args:
        model: the adapted model, or a wrapper around it.
        mask: `(B, 1, H, W)` or `(1, 1, H, W)`, in [0, 1], pixel space; 1 = remove. When guidance
            repeats the batch, one mask per sample before the repetition is enough. Copied without
            its graph.
        image: `(B, 3, H, W)`, in [0, 1]; needed for the mask's `detail_complexity`. Read without
            its graph.
        mask_info: an already analyzed mask, instead of `mask` and `image`. Gradients reach it; one
            with a graph can be used for one backward pass.
        task_hint: `<expert>_focus` or `<expert>_only`, for example "removal_focus"; or a sequence
            with one of them, or `None` for no hint, per sample, as with masks.
        grid_size: `(rows, columns)` of the model's image tokens.
        timestep_range: the timesteps `(clean, noise)` of clean data and of pure noise; by default
            those of the model's family.

    Raises:
        ValueError: for both `mask` and `mask_info`, an image without a mask, an unknown hint, a
            grid that is not two integers >= 1, or a range that is not two different finite numbers.
    """
    state = routing_state(model)
    given = (mask, image, mask_info, task_hint, grid_size, timestep_range)
    state.given = _make_given_inputs(state, *given)


@contextmanager
def router_inputs(
    model: nn.Module,
    *,
    mask: Tensor | None = None,
    image: Tensor | None = None,
    mask_info: MaskInfo | None = None,
    task_hint: str | Sequence[str | None] | None = None,
    grid_size: tuple[int, int] | None = None,
    timestep_range: tuple[float, float] | None = None,
) -> Iterator[None]:
    """Set router inputs that the model's own call does not contain, inside the context.

    Unlike `set_router_inputs`, the context affects only this thread (or asyncio task), so that
    concurrent requests to one model do not share masks. It replaces all inputs set outside of it,
    and restores them at its end. The arguments are those of `set_router_inputs`.

    Raises:
        ValueError: as `set_router_inputs`.
    """
    state = routing_state(model)
    given = _make_given_inputs(state, mask, image, mask_info, task_hint, grid_size, timestep_range)
    with state.steer(given=given):
        yield


def _make_given_inputs(
    state: RoutingState,
    mask: Tensor | None,
    image: Tensor | None,
    mask_info: MaskInfo | None,
    task_hint: str | Sequence[str | None] | None,
    grid_size: tuple[int, int] | None,
    timestep_range: tuple[float, float] | None,
) -> GivenInputs:
    if mask is not None and mask_info is not None:
        raise ValueError("Expected one of `mask` and `mask_info`, but got both.")
    if image is not None and mask is None:
        raise ValueError("Expected `mask` together with `image`, but got none.")
    if task_hint is not None and not isinstance(task_hint, str):
        task_hint = tuple(task_hint)
    state.check_hint(task_hint)
    if grid_size is not None:
        grid_size = check_size(grid_size, "grid_size")
    if timestep_range is not None:
        timestep_range = _check_timestep_range(timestep_range)
    if mask is not None:
        mask_info = analyze_detached(mask, image)
    elif mask_info is not None:
        with torch.inference_mode(False):
            mask_info = mask_info.copy()
    return GivenInputs(mask_info, task_hint, grid_size, timestep_range)


def attach_router(model: nn.Module, router: Router, adapter_name: str = "default") -> None:
    """Attach a router to an adapter, instead of its previous router.

    The adapter's strategy, temperature and `top_k` apply. Create the optimizer afterwards, so that
    it includes the router's parameters.

    Args:
        model: the adapted model, or a wrapper around it.
        router: any `Router`.
        adapter_name: the adapter.

    Raises:
        TypeError: when `router` is not a `Router`, or its constructor's arguments are not JSON
            values.
        ValueError: when the adapter does not exist.
    """
    if not isinstance(router, Router):
        raise TypeError(f"Expected `router` to be a moe_lora.Router, but got {type(router)}.")
    try:
        json.dumps(router.init_kwargs)
    except TypeError as error:
        raise TypeError(
            f"Expected {type(router).__name__} to be built with JSON values, for checkpoints, but "
            f"got {router.init_kwargs}."
        ) from error
    module = routed_module(model)
    router.train(module.training)
    getattr(module, ROUTER_ATTRIBUTE).attach(adapter_name, router)


def adapted_layers(model: nn.Module, adapter_name: str = "default") -> tuple[str, ...]:
    """List the paths of an adapter's layers, in the order of weights per layer.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: the adapter.

    Raises:
        ValueError: when the adapter does not exist.
    """
    return _for_adapter(routing_state(model).layer_names, adapter_name)


def routing_stats(model: nn.Module, adapter_name: str = "default") -> RoutingStats:
    """Return the statistics of an adapter's routing weights since the last reset.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: the adapter.

    Raises:
        ValueError: when the adapter does not exist.
    """
    return _for_adapter(routing_state(model).stats, adapter_name)


def current_routing(model: nn.Module, adapter_name: str = "default") -> RoutingDecision | None:
    """Return weights and logits of this thread's last pass, with gradient, for auxiliary losses.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: the adapter.

    Returns:
        The decision; `None` when the last pass ran without a router.
    """
    return routing_state(model).thread_state.decisions.get(adapter_name)


def routed_checkpoint(
    model: nn.Module, checkpoint: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Create an activation-checkpointing function that recomputes with the same routing.

    It is needed for losses on inner features alone, which raise without it; losses on the model's
    output work with any checkpointing function. Compiled blocks are checked less: an inner feature
    of one pass, in one backward pass with the output of a later pass, gets a wrong gradient without
    an error.

    Args:
        model: the adapted model, or a wrapper around it.
        checkpoint: the function to wrap; by default `torch.utils.checkpoint.checkpoint`, whose
            keyword arguments, such as `use_reentrant=False`, the caller passes.

    Returns:
        A function `(function, *args, **kwargs)`, like `torch.utils.checkpoint.checkpoint`.
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


def _for_adapter(by_adapter: dict[str, Value], adapter_name: str) -> Value:
    if adapter_name not in by_adapter:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(by_adapter)}, but got {adapter_name!r}."
        )
    return by_adapter[adapter_name]
