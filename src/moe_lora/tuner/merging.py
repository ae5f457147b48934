"""Merging a mixture with fixed routing weights into the base model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

from moe_lora.routing.lookup import routed_module
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.experts import MoELoraExperts
from moe_lora.tuner.state_dict.adapter_tensors import check_not_on_disk


def merge(
    model: nn.Module,
    weights: Tensor | Sequence[float] | None = None,
    *,
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
) -> None:
    """Merge the adapters of a model into its base weights, in place, with fixed routing weights.

    `W ← W + B · diag(s · w) · A`. `unmerge` reverts it. When an error is raised, no layer is
    merged.

    Args:
        model: the adapted model, or a wrapper around it.
        weights: `(E,)`; `None` means the fixed weights of the model's routing (uniform mode, no
            router, or a router with input-independent weights).
        adapter_names: the adapters; the active ones by default.
        safe_merge: check for NaN and inf before a base weight changes.

    Raises:
        ValueError: when `weights` is `None` and the router's weights depend on the input, since
            no single base weight equals an input-dependent mixture; for weights not of shape
            (E,); when several parts of the model are adapted; or, with `safe_merge`, for NaN or
            inf.
    """
    base = routed_module(model)
    if weights is not None:
        given = weights if isinstance(weights, Tensor) else torch.tensor(weights, device="cpu")
        weights = given.float()
        if weights.ndim != 1:
            raise ValueError(
                f"Expected `weights` to have shape (E,), but got {tuple(weights.shape)}."
            )
    check_mergeable(base, adapter_names, safe_merge=safe_merge, weights=weights)
    for layer in _layers(base):
        with onload_layer(layer):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names, weights=weights)


def unmerge(model: nn.Module) -> None:
    """Remove merged adapters from the base weights.

    Args:
        model: the adapted model, or a wrapper around it.

    Raises:
        ValueError: when the model has no adapter, or several adapted parts, or when weights are
            offloaded to disk.
    """
    base = routed_module(model)
    check_not_on_disk(base)
    for layer in _layers(base):
        if layer.merged:
            with onload_layer(layer):
                layer.unmerge()


def check_mergeable(
    model: nn.Module,
    adapter_names: list[str] | None = None,
    *,
    safe_merge: bool = False,
    weights: Tensor | None = None,
) -> None:
    """Raise, before a base weight changes, if merging would raise in any layer.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_names: the adapters; the active ones by default.
        safe_merge: check for NaN and inf, too, which computes every merged weight an extra time.
        weights: `(E,)`; `None` means the fixed weights of the model's routing.

    Raises:
        ValueError: when an adapter's weights depend on the input, or `weights` are for another
            number of experts; with `safe_merge`, for NaN or inf; when weights are on disk.
        TypeError: for a quantized weight that cannot be merged into.
    """
    check_not_on_disk(model)
    for layer in _layers(model):
        names = layer.active_adapters if adapter_names is None else adapter_names
        new = [n for n in names if n in layer.moe_lora_experts and n not in layer.merged_adapters]
        mixed = {name: _fixed_weights(layer, name, weights) for name in new}
        if not getattr(layer.quantization_backend, "supports_merge", True):
            layer.get_base_weight()  # raises with the reason
        broken = None
        if safe_merge and new:
            with onload_layer(layer):
                broken = _find_non_finite_adapter(layer, mixed)
        if broken is not None:
            raise ValueError(
                f"Expected finite merged weights, but adapter {broken!r} produces NaN or inf."
            )


def _fixed_weights(layer: RoutedLayer, adapter_name: str, weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return layer.context.fixed_weights(adapter_name)
    experts = cast(MoELoraExperts, layer.moe_lora_experts[adapter_name]).num_experts
    if weights.shape != (experts,):
        raise ValueError(
            f"Expected `weights` to have shape (E,) with E={experts} for adapter "
            f"{adapter_name!r}, but got {tuple(weights.shape)}."
        )
    return weights


def _find_non_finite_adapter(layer: RoutedLayer, weights: dict[str, Tensor | None]) -> str | None:
    merged = layer.get_base_weight()
    for name, mixed in weights.items():
        delta = layer.get_delta_weight(name, mixed)
        merged = (merged.to(delta) + delta).to(merged.dtype)
        if not merged.isfinite().all():
            return name
    return None


def _layers(model: nn.Module) -> list[RoutedLayer]:
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]
