"""The mixture of experts in differentiable operations of PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def mixture(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """Apply a mixture of LoRA experts in two matrix products.

    `B · (s · w ⊙ (A x))`, where `A` is viewed as `(E·r, in)` and `B` as `(out, E·r)`.

    Args:
        x: `(..., in)`.
        lora_A: `(E, r, in)`.
        lora_B: `(out, E, r)`.
        weights: broadcasts against `(..., E)`, where the dots are those of `x`; `None` means 1/E.
        scaling: `s`, usually lora_alpha / r.

    Returns:
        `(..., out)`.

    Source: Hu et al., "LoRA: low-rank adaptation of large language models", 2021,
        arXiv:2106.09685, section 4.1, for each expert.

    Example:
        >>> A, B = torch.ones(2, 1, 3), torch.tensor([[[1.0], [10.0]]])
        >>> mixture(torch.ones(1, 3), A, B, torch.tensor([[0.25, 0.75]]))
        tensor([[23.2500]])
    """
    return mixture_product(x, mixture_operands(lora_A, lora_B, weights, scaling))


class Mixture(NamedTuple):
    """Operands of one layer's mixture product, `scale · B (gate ⊙ A x)`.

    Attributes:
        lora_A: `(E, r, in)`.
        lora_B: `(out, E, r)`.
        gate: broadcasts against `(..., E)`, or `(..., k)` with `expert_indices`; `None` means 1.
        scale: the factor of the product where `gate` is `None`, else 1.
        expert_indices: `(B, 1, k)`, or with more ones: the experts of every sample; `None` means
            all.
        expert_grad_mask: 1 where a sample's gradient reaches the parameters of an expert and 0
            where not; broadcasts like the gate. `None` means no mask.
    """

    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor | None
    scale: float
    expert_indices: Tensor | None
    expert_grad_mask: Tensor | None


def mixture_operands(
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor | None,
    scaling: float,
    expert_indices: Tensor | None = None,
    expert_grad_mask: Tensor | None = None,
) -> Mixture:
    """Return the operands of a mixture product, with the scaling folded into the weights.

    The arguments are those of `mixture` and `Mixture`.
    """
    if weights is None:
        return Mixture(lora_A, lora_B, None, scaling / lora_A.shape[0], None, expert_grad_mask)
    if expert_indices is not None:
        weights = weights.gather(-1, expert_indices)
        if expert_grad_mask is not None:
            expert_grad_mask = expert_grad_mask.gather(-1, expert_indices)
    return Mixture(lora_A, lora_B, weights * scaling, 1.0, expert_indices, expert_grad_mask)


class LinearParameters(NamedTuple):
    """Weight `(out, in)` and bias `(out,)` of a frozen linear layer."""

    weight: Tensor
    bias: Tensor | None


def add_mixture_unfused(x: Tensor, mix: Mixture, base: Tensor | LinearParameters) -> Tensor:
    """Return the sum of the base layer's output and the mixture product.

    Args:
        x: `(..., in)`.
        mix: the mixture's operands.
        base: `(..., out)`, the base layer's output; or the parameters of a linear layer to apply
            to `x`.
    """
    output = F.linear(x, *base) if isinstance(base, LinearParameters) else base
    return output + mixture_product(x, mix)


def mixture_product(x: Tensor, mix: Mixture) -> Tensor:
    """Compute `scale · B (gate ⊙ A x)`, gradients masked by `expert_grad_mask`."""
    A, B = stack_experts(mix.lora_A, mix.lora_B, mix.expert_indices, x.dtype)
    multiply = F.linear if mix.expert_indices is None else _multiply_per_sample
    hidden = multiply(x, A)
    if mix.expert_grad_mask is not None:
        detached = multiply(x, A.detach())
        hidden = detached + apply_gate(hidden - detached, mix.expert_grad_mask)
    gated = hidden * mix.scale if mix.gate is None else apply_gate(hidden, mix.gate)
    if mix.expert_grad_mask is None:
        return multiply(gated, B)
    trained = apply_gate(gated, mix.expert_grad_mask)
    return multiply(trained, B) + multiply(gated - trained, B.detach())


def stack_experts(
    lora_A: Tensor, lora_B: Tensor, expert_indices: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stack the experts of a layer, or of every sample, into one matrix each.

    Args:
        lora_A: `(E, r, in)`.
        lora_B: `(out, E, r)`.
        expert_indices: `(B, 1, k)`, or with more ones: the experts of every sample.
        dtype: the dtype of the matrices.

    Returns:
        `(E·r, in)` and `(out, E·r)`; with indices `(B, k·r, in)` and `(B, out, k·r)`, without the
        experts that a sample does not use.
    """
    if expert_indices is None:
        return lora_A.flatten(0, 1).to(dtype), lora_B.flatten(1).to(dtype)
    (out, _, r), experts = lora_B.shape, expert_indices.flatten()
    batch, width = expert_indices.shape[0], expert_indices.shape[-1] * r
    A = lora_A.index_select(0, experts).view(batch, width, lora_A.shape[-1])
    B = lora_B.index_select(1, experts).view(out, batch, width).transpose(0, 1)
    return A.to(dtype), B.to(dtype)


def apply_gate(hidden: Tensor, gate: Tensor | None) -> Tensor:
    """Multiply each of the `G` equal parts of the last dimension by its entry of the gate.

    Args:
        hidden: `(..., K)`.
        gate: broadcasts against `(..., G)`; `None` means 1.

    Returns:
        `(..., K)`, in the dtype of `hidden`.
    """
    if gate is None:
        return hidden
    r = hidden.shape[-1] // gate.shape[-1]
    # One entry per column: a product over parts of `r` columns would be slow where `r` is small.
    columns = gate.to(hidden.dtype).unsqueeze(-1).expand(*gate.shape, r).flatten(-2)
    return hidden * columns


def flatten_tokens(x: Tensor, A: Tensor) -> Tensor:
    """Flatten to `(tokens, width)`, or to `(B, tokens, width)` for an `A` per sample."""
    samples = A.shape[:-2]
    return x.reshape(*samples, math.prod(x.shape[len(samples) : -1]), x.shape[-1])


def _multiply_per_sample(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply every sample of `(B, ..., in)` by its matrix of `(B, out, in)`."""
    return (flatten_tokens(x, weight) @ weight.mT).view(*x.shape[:-1], weight.shape[-2])
