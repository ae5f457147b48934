"""A slow reference of an adapted model: a copy of the base model, and one hook on every layer.

It reads the stored tensors of the adapters and knows nothing of how the adapted model computes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WRAPPERS = {"base_model", "model", "base_layer", "_checkpoint_wrapped_module", "_orig_mod"}


@dataclass(frozen=True)
class Mixture:
    """Adapt layers by experts: `y[b] += sum_e w[b, e] s B_e A_e x[b]`.

    Args:
        experts: `lora_A (E, r, in, ...)` and `lora_B (out, E, r)` by layer.
        weights: `(E,)`, `(B, E)`, or `(B, T, E)` for layers that see these `T` tokens.
        scaling: `lora_alpha / r`, times the strength of the adapter.
    """

    experts: Mapping[str, tuple[Tensor, Tensor]]
    weights: Tensor
    scaling: float

    def added(self, path: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if path not in self.experts:
            return y
        lora_A, lora_B = self.experts[path]
        rows = []
        for b in range(x.shape[0]):
            row = y[b]
            for e in range(lora_A.shape[0]):
                weight = self.weights[e] if self.weights.ndim == 1 else self.weights[b, ..., e]
                out = one_expert(layer, x[b], lora_A[e], lora_B[:, e])
                row = row + weight[..., None] * self.scaling * out
            rows.append(row)
        return torch.stack(rows)


@dataclass(frozen=True)
class Delta:
    """Adapt layers by a change of their weights, as PEFT's `get_delta_weight` returns it.

    Args:
        weights: `(out, in, ...)` by layer.
        strength: a factor for all of them.
    """

    weights: Mapping[str, Tensor]
    strength: float = 1.0

    def added(self, path: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if path not in self.weights:
            return y
        weight = self.weights[path] * self.strength
        if isinstance(layer, nn.Conv2d):
            return y + layer._conv_forward(x, weight, None)
        return y + F.linear(x, weight)


class Reference:
    """Compute what a base model does under adapters.

    Args:
        base: the model before it is adapted; it is copied.
    """

    def __init__(self, base: nn.Module) -> None:
        self.model = copy.deepcopy(base)

    def __call__(self, terms: Iterable[Mixture | Delta], *args: Any, **kwargs: Any) -> Any:
        terms = list(terms)
        known = {
            path: layer
            for path, layer in self.model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
        }
        for term in terms:
            named = term.experts if isinstance(term, Mixture) else term.weights
            assert set(named) <= set(known), f"no such layers: {set(named) - set(known)}"
        handles = [
            layer.register_forward_hook(_adding(terms, path)) for path, layer in known.items()
        ]
        try:
            return self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def one_expert(layer: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Return `B A x` for one sample, of a linear layer or a convolution."""
    if isinstance(layer, nn.Conv2d):
        hidden = layer._conv_forward(x[None], A, None)
        return F.conv2d(hidden, B[..., None, None])[0]
    return x @ A.T @ B.T


def mixture_of(
    model: nn.Module, weights: Tensor, adapter_name: str = "default", strength: float = 1.0
) -> Mixture:
    """Read a mixture's experts off the parameters of an adapted model."""
    experts: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        path, found, rest = name.partition(f".moe_lora_experts.{adapter_name}.")
        if found:
            experts.setdefault(layer_path(path), {})[rest] = parameter
    config = model.peft_config[adapter_name]
    pairs = {path: (pair["lora_A"], pair["lora_B"]) for path, pair in experts.items()}
    return Mixture(pairs, weights, strength * config.lora_alpha / config.r)


def delta_of(model: nn.Module, adapter_name: str, strength: float = 1.0) -> Delta:
    """Read the changes of the weights of a plain adapter (LoRA, LoHa) off an adapted model."""
    weights = {}
    for path, layer in model.named_modules():
        names = getattr(layer, "adapter_layer_names", ())
        held = [getattr(layer, name) for name in names if not name.startswith("moe_lora")]
        if any(adapter_name in container for container in held):
            weights[layer_path(path)] = layer.get_delta_weight(adapter_name).detach()
    return Delta(weights, strength)


def layer_path(path: str) -> str:
    """Return a layer's path in the base model, without what wrappers and tuners put into it."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def _adding(terms: Iterable[Mixture | Delta], path: str) -> Any:
    def add(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        for term in terms:
            y = term.added(path, layer, args[0], y)
        return y

    return add
