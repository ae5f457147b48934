"""Choose the fixed weights under which a mixture becomes one plain LoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lora.masks import MaskInfo, analyze
from moe_lora.routing.control import routing_stats
from moe_lora.routing.lookup import routed_module, routing_state
from moe_lora.routing.model_call import ModelCall
from moe_lora.routing.routers.base import Router
from moe_lora.routing.routers.registry import router_class
from moe_lora.tuner.config import MoELoraConfig

CHOICES = (
    'one number per expert, an expert\'s name, "uniform", "mean" over the recorded statistics, or '
    "moe_lora.export.weights_for(model, ...) for one input"
)


class FixedWeights(NamedTuple):
    """Fixed weights and their origin.

    Attributes:
        weights: `(E,)`, float32, on the CPU.
        source: "given", "expert", "uniform", "mean", "for" or "fixed".
    """

    weights: Tensor
    source: str


@torch.no_grad()
def weights_for(
    model: nn.Module,
    *args: Any,
    mask: Tensor | None = None,
    image: Tensor | None = None,
    mask_info: MaskInfo | None = None,
    task_hint: str | None = None,
    grid_size: tuple[int, int] | None = None,
    adapter_name: str = "default",
    **kwargs: Any,
) -> Tensor:
    """Compute the routing weights of one input, without calling the model.

    The router reads what `model(*args, **kwargs)` would give it: FLUX Fill and 9-channel inpainting
    models carry image and mask in their own inputs, others get the mask here. It answers in
    evaluation mode, whatever the routing mode is, and no statistics are recorded.

    Args:
        model: the adapted model, or a wrapper around it.
        args: positional arguments of the call; its batch is 1.
        mask: `(1, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        image: `(1, 3, H, W)`, in [0, 1]; with it the mask's `detail_complexity` is known.
        mask_info: an already analyzed mask, instead of `mask` and `image`.
        task_hint: as in `set_router_inputs`.
        grid_size: `(rows, columns)` of the model's image tokens.
        adapter_name: whose router.
        kwargs: keyword arguments of the call.

    Returns:
        `(E,)`, float32, on the CPU.

    Raises:
        ValueError: when the adapter has no router, for a batch of more than one sample, or when the
            router gives weights per token or per layer: no LoRA of a mixture equals these, and an
            average is the caller's to take.
    """
    if mask is not None and mask_info is not None:
        raise ValueError("Expected one of `mask` and `mask_info`, but got both.")
    if image is not None and mask is None:
        raise ValueError("Expected `mask` together with `image`, but got none.")
    base, state = routed_module(model), routing_state(model)
    state.check_hint(task_hint)
    if adapter_name not in state.routers:
        raise ValueError(f"Expected adapter {adapter_name!r} to have a router, but it has none.")
    router = state.routers[adapter_name]
    assert isinstance(router, Router)
    given = state.given
    if mask is not None:
        mask_info = analyze(mask, image)
    inputs = ModelCall.read(base, args, kwargs).router_inputs(
        replace(
            given,
            mask_info=mask_info or given.mask_info,
            task_hint=task_hint or given.task_hint,
            grid_size=grid_size or given.grid_size,
        )
    )
    home = next((p.device for p in router.parameters() if not p.is_meta), None)
    weights = _in_eval(router, inputs if home is None else inputs.to(home))
    if weights.ndim != 2 or weights.shape[0] != 1:
        per = "sample" if weights.ndim == 2 else "layer" if router.num_layers else "token"
        raise ValueError(
            f"Expected routing weights of one input, but {type(router).__name__} gives them per "
            f"{per}, in the shape {tuple(weights.shape)}. Pass a batch of 1, or average them "
            "yourself and pass the result as `weights`."
        )
    return weights[0].float().cpu()


def resolve_weights(
    weights: Tensor | Sequence[float] | str | None,
    names: Sequence[str],
    *,
    fixed: Callable[[], Tensor | None],
    mean: Callable[[], Tensor],
) -> FixedWeights:
    """Resolve `weights` to numbers.

    Args:
        weights: numbers, an expert's name, "uniform", "mean", or `None` for what the routing fixes.
        names: the experts in order.
        fixed: returns the `(E,)` weights that the routing fixes, `None` if they are uniform.
        mean: returns the `(E,)` mean of recorded weights.

    Raises:
        TypeError: for an object that is no sequence of numbers.
        ValueError: for weights of another shape, of NaN, inf or zeros only, or an unknown name.
    """
    count = len(names)
    if weights is None:
        fixed_weights = fixed()
        return _checked(
            torch.ones(count) / count if fixed_weights is None else fixed_weights, count, "fixed"
        )
    if not isinstance(weights, str):
        return _checked(torch.as_tensor(weights), count, "given")
    if weights in names:
        return FixedWeights(torch.eye(count)[list(names).index(weights)], "expert")
    if weights == "uniform":
        return FixedWeights(torch.ones(count) / count, "uniform")
    if weights == "mean":
        return _checked(mean(), count, "mean")
    raise ValueError(
        f"Expected `weights` to be {CHOICES}, but got {weights!r}. The experts are {list(names)}."
    )


def weights_for_model(
    model: nn.Module,
    weights: Tensor | Sequence[float] | str | None,
    *,
    adapter_name: str,
    inputs: Mapping[str, Any] | None,
) -> FixedWeights:
    """Resolve the `weights` of `export_lora` for an adapted model."""
    if (isinstance(weights, str) and weights == "for") != (inputs is not None):
        raise ValueError(
            'Expected `inputs` together with weights="for", and with no other weights, but got '
            f"weights={weights!r} and {'no ' if inputs is None else ''}`inputs`."
        )
    if inputs is not None:
        weights = weights_for(model, adapter_name=adapter_name, **inputs)
        return FixedWeights(weights, "for")
    state = routing_state(model)

    def fixed() -> Tensor | None:
        try:
            return state.fixed_weights(adapter_name)
        except ValueError as error:
            raise _input_dependent(type(state.routers[adapter_name]).__name__) from error

    def mean() -> Tensor:
        means = torch.tensor(routing_stats(model, adapter_name).mean_weights)
        if means.isnan().any():
            raise ValueError(
                'Expected recorded routing statistics for weights="mean", but none were recorded '
                "since they were last reset. Call the model on typical inputs first."
            )
        return means

    return resolve_weights(weights, state.expert_names[adapter_name], fixed=fixed, mean=mean)


def weights_for_checkpoint(
    weights: Sequence[float] | str | None, config: MoELoraConfig
) -> FixedWeights:
    """Resolve the `weights` of an export for a checkpoint, which has no statistics."""

    def fixed() -> Tensor | None:
        if config.router is None:
            return None
        router = router_class(config.router)(**config.router_kwargs).configure(
            config.experts,
            strategy=config.routing_strategy,
            temperature=config.routing_temperature,
            top_k=config.top_k,
        )
        fixed_weights = router.fixed_weights()
        if fixed_weights is None:
            raise _input_dependent(type(router).__name__)
        return fixed_weights

    def mean() -> Tensor:
        raise ValueError(
            'Expected a model in memory for weights="mean", but a checkpoint holds no routing '
            "statistics. Pass the numbers instead."
        )

    return resolve_weights(weights, config.experts, fixed=fixed, mean=mean)


def _input_dependent(router: str) -> ValueError:
    return ValueError(
        f"Expected fixed routing weights to export, but the {router} computes them from the input, "
        f"which no single LoRA equals. Choose `weights`: {CHOICES}."
    )


def _in_eval(router: Router, inputs: Any) -> Tensor:
    # Dropout would make the answer a random one.
    training = [module for module in router.modules() if module.training]
    router.eval()
    try:
        weights: Tensor = router(inputs).weights
        return weights
    finally:
        for module in training:
            module.training = True


def _checked(weights: Tensor, count: int, source: str) -> FixedWeights:
    weights = weights.detach().float().cpu()
    if weights.shape != (count,):
        raise ValueError(
            f"Expected `weights` to have shape (E={count},), but got {tuple(weights.shape)}."
        )
    if not weights.isfinite().all() or not weights.any():
        raise ValueError(
            f"Expected finite `weights` that are not all 0, but got {weights.tolist()}."
        )
    return FixedWeights(weights, source)
