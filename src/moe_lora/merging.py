"""Fold a fixed mixture into the base model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import Tensor, nn

from moe_lora.layer import MoELoraLayer
from moe_lora.routing.control import routing_state


def merge(
    model: nn.Module,
    weights: Tensor | Sequence[float] | None = None,
    *,
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
) -> None:
    """Merge the adapters of a model into its base weights, in place, under fixed weights.

    `W ← W + B · diag(s · w) · A`. `unmerge` takes them out again.

    Args:
        model: the adapted model, or a wrapper around it.
        weights: `(E,)`; `None` takes the weights that the model's routing fixes (uniform mode, no
            router, or a router whose weights do not depend on the input).
        adapter_names: which adapters; the active ones by default.
        safe_merge: refuse NaN and inf before a base weight changes.

    Raises:
        ValueError: when `weights` is `None` and the router chooses weights for every input, since
            no single base weight equals an input-dependent mixture; or for weights not of shape
            (E,).
    """
    state = routing_state(model)
    previous = state.override, state.override_top_k
    if weights is not None:
        weights = torch.as_tensor(weights, dtype=torch.float32)
        if weights.ndim != 1:
            raise ValueError(
                f"Expected `weights` to have shape (E,), but got {tuple(weights.shape)}."
            )
        state.set_override(weights)
    try:
        for layer in _tuner_layers(model):
            with onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    finally:
        state.set_override(*previous)


def unmerge(model: nn.Module) -> None:
    """Take merged adapters out of the base weights again.

    Args:
        model: the adapted model, or a wrapper around it.
    """
    for layer in _tuner_layers(model):
        if layer.merged:
            with onload_layer(layer):
                layer.unmerge()


def _tuner_layers(model: nn.Module) -> list[MoELoraLayer]:
    return [module for module in model.modules() if isinstance(module, MoELoraLayer)]
