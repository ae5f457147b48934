"""The mixture added to a base layer's output in one autograd function."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.routing.weights.checkpointing import check_version, check_version_in_backward
from moe_lora.tracing import has_plain_values, is_transformed
from moe_lora.tuner.mixture_product.fast_path import can_fuse
from moe_lora.tuner.mixture_product.plain import (
    LinearParameters,
    Mixture,
    add_mixture_unfused,
    apply_gate,
    flatten_tokens,
    mixture_product,
    stack_experts,
)


def add_mixture(
    x: Tensor,
    mix: Mixture,
    base: Tensor | LinearParameters,
    routing_version: Tensor | None = None,
) -> Tensor:
    """Add a mixture to the output of a base layer in as few passes over memory as possible.

    `base + scale · B (gate ⊙ A x)`, computed in the dtype of `x`. The product with `B` accumulates
    into the base's output, and in the backward pass the product with `A` into the gradient of `x`.
    Only `x` and `A x` are saved for the backward pass; the gated tensor is recomputed. If
    `can_fuse` is false, plain differentiable operations compute the same.

    Args:
        x: `(..., in)`.
        mix: the mixture's operands.
        base: `(..., out)`, the base layer's output in the dtype of `x`; or the parameters of a
            frozen linear layer to apply to `x`.
        routing_version: the version of the routing; see `checkpointing.check_version`.

    Returns:
        `(..., out)`.
    """
    if isinstance(base, LinearParameters):
        output, weight, bias = None, base.weight, base.bias
    else:
        output, weight, bias = base, None, None
    tensors = (mix.lora_A, mix.lora_B, mix.gate, mix.expert_indices, mix.expert_grad_mask)
    if can_fuse(x, *tensors, output, weight, bias):
        args = (x, *mix, output, weight, bias, routing_version)
        added: Tensor = _AddMixture.apply(*args)  # type: ignore[no-untyped-call]
        return added
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            result = add_mixture_unfused(x, mix, base)
    else:
        result = add_mixture_unfused(x, mix, base)
    return check_version_in_backward(result, None if is_transformed() else routing_version)


class _AddMixture(torch.autograd.Function):
    """`base + scale · B (gate ⊙ A x)` with its own backward pass; see `add_mixture`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate: Tensor | None,
        scale: float,
        expert_indices: Tensor | None,
        expert_grad_mask: Tensor | None,
        output: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        version: Tensor | None,
    ) -> Tensor:
        with _autocast_disabled(x.device.type):
            A, B = stack_experts(lora_A, lora_B, expert_indices, x.dtype)
            hidden = flatten_tokens(x, A) @ A.mT
            gated = apply_gate(hidden.view(*x.shape[:-1], hidden.shape[-1]), gate)
            gated = flatten_tokens(gated, A)
            if weight is None:
                assert output is not None
                result = _add_product(flatten_tokens(output, A), gated, B.mT, scale)
            else:
                result = flatten_tokens(F.linear(x, weight, bias), A)
                result = _add_product(result, gated, B.mT, scale, out=result)
        ctx.scale = scale
        ctx.version = None if version is None else int(version)
        indices_and_mask = (expert_indices, expert_grad_mask)
        ctx.save_for_backward(x, lora_A, lora_B, gate, *indices_and_mask, weight, hidden, version)
        # The output of a Function must not be a view, so that it can be modified in place.
        shape = (*x.shape[:-1], result.shape[-1])
        shaped: Tensor = torch.ops.aten._unsafe_view.default(result, shape)
        return shaped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once only: a checkpoint frees them
        x, lora_A, lora_B, gate, indices, grad_mask, weight, hidden, version = saved
        check_version(version, ctx.version)
        if torch.is_grad_enabled() or not has_plain_values(grad):
            return _plain_backward(ctx, saved, grad)
        grads: list[Tensor | None] = [None] * 11
        needs = ctx.needs_input_grad
        with _autocast_disabled(x.device.type):
            A, B = stack_experts(lora_A, lora_B, indices, x.dtype)
            tokens, outer = flatten_tokens(x, A), flatten_tokens(grad, A)
            shape = (*x.shape[:-1], hidden.shape[-1])
            from_gated = outer @ B
            if needs[2]:
                gated = apply_gate(hidden.view(shape), _multiply_gates(gate, grad_mask))
                product = outer.mT @ flatten_tokens(gated, A) * ctx.scale
                grads[2] = _unstack_B(product, lora_B, indices)
            if gate is not None and needs[3]:
                grads[3] = _sum_to_gate((from_gated * hidden).view(shape), gate)
            from_hidden = flatten_tokens(apply_gate(from_gated.view(shape), gate), A)
            if ctx.scale != 1:
                from_hidden = from_hidden * ctx.scale
            if needs[1]:
                masked = flatten_tokens(apply_gate(from_hidden.view(shape), grad_mask), A)
                grads[1] = _unstack_A(masked.mT @ tokens, lora_A, indices)
            if needs[0]:
                inner = None if weight is None else outer @ weight
                grads[0] = _add_product(inner, from_hidden, A, out=inner).view_as(x)
            grads[7] = grad if needs[7] else None
        return tuple(grads)


def _autocast_disabled(device: str) -> AbstractContextManager[object]:
    """Return a context that disables autocast."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()  # entering and leaving `torch.autocast` takes microseconds


def _plain_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients of `_AddMixture` by plain operations, for `create_graph` and vmap."""
    x, lora_A, lora_B, gate, indices, grad_mask, weight, _, _ = saved
    needs = ctx.needs_input_grad[:4]
    grads: list[Tensor | None] = [None] * 11
    grads[7] = grad if ctx.needs_input_grad[7] else None
    if not any(needs):
        return tuple(grads)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # A gate may depend on x: views of both are independent inputs.
        x, lora_A, lora_B = (t.view_as(t) for t in (x, lora_A, lora_B))
        gate = None if gate is None else gate.view_as(gate)
        mix = Mixture(lora_A, lora_B, gate, ctx.scale, indices, grad_mask)
        if weight is None:
            result = mixture_product(x, mix)
        else:
            result = add_mixture_unfused(x, mix, LinearParameters(weight, None))
        inputs = [t for t, need in zip((x, lora_A, lora_B, gate), needs, strict=True) if need]
        found = iter(torch.autograd.grad(result, inputs, grad, create_graph=create_graph))
    grads[:4] = [next(found) if need else None for need in needs]
    return tuple(grads)


def _unstack_A(grad: Tensor, lora_A: Tensor, expert_indices: Tensor | None) -> Tensor:
    """Return the gradient of stacked `A` in the shape of `lora_A`."""
    grad = grad.to(lora_A.dtype)
    if expert_indices is None:
        return grad.view_as(lora_A)
    grad = grad.view(-1, *lora_A.shape[1:])
    return torch.zeros_like(lora_A).index_add(0, expert_indices.flatten(), grad)


def _unstack_B(grad: Tensor, lora_B: Tensor, expert_indices: Tensor | None) -> Tensor:
    """Return the gradient of stacked `B` in the shape of `lora_B`."""
    grad = grad.to(lora_B.dtype)
    if expert_indices is None:
        return grad.view_as(lora_B)
    grad = grad.transpose(0, 1).reshape(lora_B.shape[0], -1, lora_B.shape[-1])
    return torch.zeros_like(lora_B).index_add(1, expert_indices.flatten(), grad)


def _multiply_gates(gate: Tensor | None, other: Tensor | None) -> Tensor | None:
    if gate is None or other is None:
        return other if gate is None else gate
    return gate * other


def _sum_to_gate(product: Tensor, gate: Tensor) -> Tensor:
    """Sum `(..., K)` over the columns of each expert, and over the gate's broadcast dimensions."""
    ones = (1,) * (product.ndim - gate.ndim) + tuple(gate.shape[:-1])
    over = [axis for axis, size in enumerate(ones) if size == 1]
    if over:
        product = product.sum(over, keepdim=True, dtype=gate.dtype)
    experts = gate.shape[-1]
    parts = product.view(*product.shape[:-1], experts, product.shape[-1] // experts)
    return parts.sum(-1, dtype=gate.dtype).view_as(gate)


def _add_product(
    base: Tensor | None, a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return `base + scale · a b`; in place where `out` is `base`."""
    if base is None:
        return a @ b
    if base.ndim == 2:
        return torch.addmm(base, a, b, alpha=scale, out=out)
    return torch.baddbmm(base, a, b, alpha=scale, out=out)
