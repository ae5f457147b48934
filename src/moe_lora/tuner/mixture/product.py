"""The mixture of experts as tensor functions."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.routing.weights.checkpointing import check_version, guarded
from moe_lora.tracing import has_plain_values, is_transformed, nothing_watches


def mixture(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, weights: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """Apply a mixture of LoRA experts in two matrix products.

    `B · (s · w ⊙ (A x))`, where `A` counts as `(E·r, in)` and `B` as `(out, E·r)`.

    Args:
        x: `(..., in)`.
        lora_A: `(E, r, in)`.
        lora_B: `(out, E, r)`.
        weights: broadcasts against `(..., E)`, where the dots are those of `x`; `None` means 1/E.
        scaling: `s`, usually lora_alpha / r.

    Returns:
        `(..., out)`.

    Example:
        >>> A, B = torch.ones(2, 1, 3), torch.tensor([[[1.0], [10.0]]])
        >>> mixture(torch.ones(1, 3), A, B, torch.tensor([[0.25, 0.75]]))
        tensor([[23.2500]])
    """
    return _product(x, mixed(lora_A, lora_B, weights, scaling))


class Mixture(NamedTuple):
    """Hold what a layer multiplies with: `y = scale · B (gate ⊙ A x)`.

    Attributes:
        lora_A: `(E, r, in)`.
        lora_B: `(out, E, r)`.
        gate: broadcasts against `(..., E)`, or `(..., k)` where experts are chosen; `None` means 1.
        scale: what stands for the gate where it is `None`, else 1.
        chosen: `(B, 1, k)`, or with more ones: the experts that every sample uses; `None` means
            all.
        learners: 1 where a sample's gradient reaches the parameters of an expert and 0 where not;
            broadcasts like the gate. `None` means 1.
    """

    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor | None
    scale: float
    chosen: Tensor | None
    learners: Tensor | None


def mixed(
    lora_A: Tensor,
    lora_B: Tensor,
    weights: Tensor | None,
    scaling: float,
    chosen: Tensor | None = None,
    learners: Tensor | None = None,
) -> Mixture:
    """Fold the scaling into the weights; arguments as in `mixture` and `Mixture`."""
    if weights is None:
        return Mixture(lora_A, lora_B, None, scaling / lora_A.shape[0], None, learners)
    if chosen is not None:
        weights = weights.gather(-1, chosen)
        learners = None if learners is None else learners.gather(-1, chosen)
    return Mixture(lora_A, lora_B, weights * scaling, 1.0, chosen, learners)


class Linear(NamedTuple):
    """Hold weight `(out, in)` and bias `(out,)` of a frozen linear layer."""

    weight: Tensor
    bias: Tensor | None


def add_mixture(
    x: Tensor, mix: Mixture, base: Tensor | Linear, stamp: Tensor | None = None
) -> Tensor:
    """Add a mixture to the output of a base layer in as few passes over it as there are.

    `base + scale · B (gate ⊙ A x)`, computed in the dtype of `x`. The product with `B` accumulates
    into the base's output, that with `A` in the backward pass into the gradient of `x`; for the
    backward pass only `x` and `A x` are kept, the gated tensor is made again. Where something
    watches (see `nothing_watches`), the same is computed in differentiable operations of PyTorch.

    Args:
        x: `(..., in)`.
        mix: the mixture.
        base: `(..., out)`, the base layer's output in the dtype of `x`; or a frozen linear layer
            that is yet to be applied to `x`.
        stamp: names the routing; see `checkpointing.check_version`.

    Returns:
        `(..., out)`.
    """
    output, (weight, bias) = (None, base) if isinstance(base, Linear) else (base, (None, None))
    operands = (x, mix.lora_A, mix.lora_B, mix.gate, mix.chosen, mix.learners, output, weight, bias)
    if nothing_watches(*operands):
        args = (x, *mix, output, weight, bias, stamp)
        added: Tensor = _AddMixture.apply(*args)  # type: ignore[no-untyped-call]
        return added
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            result = _plain_sum(x, mix, base)
    else:
        result = _plain_sum(x, mix, base)
    return guarded(result, None if is_transformed() else stamp)


class _AddMixture(torch.autograd.Function):
    """`base + scale · B (gate ⊙ A x)` with a backward pass of its own; see `add_mixture`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gate: Tensor | None,
        scale: float,
        chosen: Tensor | None,
        learners: Tensor | None,
        output: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        stamp: Tensor | None,
    ) -> Tensor:
        with _without_autocast(x.device.type):
            A, B = _side_by_side(lora_A, lora_B, chosen, x.dtype)
            hidden = _apart(x, A) @ A.mT
            gated = _apart(apply_gate(hidden.view(*x.shape[:-1], hidden.shape[-1]), gate), A)
            if weight is None:
                assert output is not None
                result = _accumulated(_apart(output, A), gated, B.mT, scale)
            else:
                result = _apart(F.linear(x, weight, bias), A)
                result = _accumulated(result, gated, B.mT, scale, out=result)
        ctx.scale = scale
        ctx.stamp = None if stamp is None else int(stamp)
        ctx.save_for_backward(x, lora_A, lora_B, gate, chosen, learners, weight, hidden, stamp)
        # A view that leaves a Function could not be modified in place.
        shape = (*x.shape[:-1], result.shape[-1])
        shaped: Tensor = torch.ops.aten._unsafe_view.default(result, shape)
        return shaped

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them out no second time
        x, lora_A, lora_B, gate, chosen, learners, weight, hidden, stamp = saved
        check_version(stamp, ctx.stamp)
        if torch.is_grad_enabled() or not has_plain_values(grad):
            return _plain_backward(ctx, saved, grad)
        grads: list[Tensor | None] = [None] * 11
        needs = ctx.needs_input_grad
        with _without_autocast(x.device.type):
            A, B = _side_by_side(lora_A, lora_B, chosen, x.dtype)
            tokens, outer = _apart(x, A), _apart(grad, A)
            shape = (*x.shape[:-1], hidden.shape[-1])
            from_gated = outer @ B
            taught = _times(gate, learners)
            if needs[2]:
                gated = _apart(apply_gate(hidden.view(shape), taught), A)
                grads[2] = _for_B(outer.mT @ gated * ctx.scale, lora_B, chosen)
            if gate is not None and needs[3]:
                grads[3] = _for_gate((from_gated * hidden).view(shape), gate)
            from_hidden = _apart(apply_gate(from_gated.view(shape), gate), A)
            if ctx.scale != 1:
                from_hidden = from_hidden * ctx.scale
            if needs[1]:
                kept = _apart(apply_gate(from_hidden.view(shape), learners), A)
                grads[1] = _for_A(kept.mT @ tokens, lora_A, chosen)
            if needs[0]:
                inner = None if weight is None else outer @ weight
                grads[0] = _accumulated(inner, from_hidden, A, out=inner).view_as(x)
            grads[7] = grad if needs[7] else None
        return tuple(grads)


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """Compute in the dtypes of the operands."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()  # entering and leaving `torch.autocast` takes microseconds


def _plain_backward(ctx: Any, saved: tuple[Any, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """Take the gradients of `_AddMixture` through plain operations, for `create_graph` and vmap."""
    x, lora_A, lora_B, gate, chosen, learners, weight, _, _ = saved
    needs = ctx.needs_input_grad[:4]
    grads: list[Tensor | None] = [None] * 11
    grads[7] = grad if ctx.needs_input_grad[7] else None
    if not any(needs):
        return tuple(grads)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # A gate may be made from x: views of both are taken as independent inputs.
        x, lora_A, lora_B = (t.view_as(t) for t in (x, lora_A, lora_B))
        gate = None if gate is None else gate.view_as(gate)
        mix = Mixture(lora_A, lora_B, gate, ctx.scale, chosen, learners)
        result = _product(x, mix) if weight is None else _plain_sum(x, mix, Linear(weight, None))
        wanted = [t for t, need in zip((x, lora_A, lora_B, gate), needs, strict=True) if need]
        found = iter(torch.autograd.grad(result, wanted, grad, create_graph=create_graph))
    grads[:4] = [next(found) if need else None for need in needs]
    return tuple(grads)


def _side_by_side(
    lora_A: Tensor, lora_B: Tensor, chosen: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Lay the experts side by side: `(K, in)` and `(out, K)`.

    Where every sample has chosen its own, `(B, K, in)` and `(B, out, K)`: the others cost nothing.
    """
    if chosen is None:
        return lora_A.flatten(0, 1).to(dtype), lora_B.flatten(1).to(dtype)
    (out, _, r), experts = lora_B.shape, chosen.flatten()
    batch, width = chosen.shape[0], chosen.shape[-1] * r
    A = lora_A.index_select(0, experts).view(batch, width, lora_A.shape[-1])
    B = lora_B.index_select(1, experts).view(out, batch, width).transpose(0, 1)
    return A.to(dtype), B.to(dtype)


def _for_A(grad: Tensor, lora_A: Tensor, chosen: Tensor | None) -> Tensor:
    """Give the gradient of A side by side back to its experts."""
    grad = grad.to(lora_A.dtype)
    if chosen is None:
        return grad.view_as(lora_A)
    grad = grad.view(-1, *lora_A.shape[1:])
    return torch.zeros_like(lora_A).index_add(0, chosen.flatten(), grad)


def _for_B(grad: Tensor, lora_B: Tensor, chosen: Tensor | None) -> Tensor:
    """Give the gradient of B side by side back to its experts."""
    grad = grad.to(lora_B.dtype)
    if chosen is None:
        return grad.view_as(lora_B)
    grad = grad.transpose(0, 1).reshape(lora_B.shape[0], -1, lora_B.shape[-1])
    return torch.zeros_like(lora_B).index_add(1, chosen.flatten(), grad)


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


def _plain_sum(x: Tensor, mix: Mixture, base: Tensor | Linear) -> Tensor:
    result = F.linear(x, *base) if isinstance(base, Linear) else base
    return result + _product(x, mix)


def _product(x: Tensor, mix: Mixture) -> Tensor:
    """Compute `scale · B (gate ⊙ A x)` in differentiable operations of PyTorch."""
    A, B = _side_by_side(mix.lora_A, mix.lora_B, mix.chosen, x.dtype)
    multiply = F.linear if mix.chosen is None else _multiply_apart
    hidden = multiply(x, A)
    if mix.learners is not None:
        untaught = multiply(x, A.detach())
        hidden = untaught + apply_gate(hidden - untaught, mix.learners)
    gated = hidden * mix.scale if mix.gate is None else apply_gate(hidden, mix.gate)
    if mix.learners is None:
        return multiply(gated, B)
    taught = apply_gate(gated, mix.learners)
    return multiply(taught, B) + multiply(gated - taught, B.detach())


def _multiply_apart(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply every sample of `(B, ..., in)` with its own of `(B, out, in)`."""
    return (_apart(x, weight) @ weight.mT).view(*x.shape[:-1], weight.shape[-2])


def _times(gate: Tensor | None, other: Tensor | None) -> Tensor | None:
    if gate is None or other is None:
        return other if gate is None else gate
    return gate * other


def _for_gate(product: Tensor, gate: Tensor) -> Tensor:
    """Sum `(..., K)` over the columns of each expert, and over what the gate broadcasts to."""
    ones = (1,) * (product.ndim - gate.ndim) + tuple(gate.shape[:-1])
    over = [axis for axis, size in enumerate(ones) if size == 1]
    if over:
        product = product.sum(over, keepdim=True, dtype=gate.dtype)
    experts = gate.shape[-1]
    parts = product.view(*product.shape[:-1], experts, product.shape[-1] // experts)
    return parts.sum(-1, dtype=gate.dtype).view_as(gate)


def _apart(x: Tensor, A: Tensor) -> Tensor:
    """Flatten to `(tokens, width)`, or `(B, tokens, width)` where every sample has its own A."""
    own = A.shape[:-2]
    return x.reshape(*own, math.prod(x.shape[len(own) : -1]), x.shape[-1])


def _accumulated(
    base: Tensor | None, a: Tensor, b: Tensor, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """Return `base + scale · a b`; in place where `out` is `base`."""
    if base is None:
        return a @ b
    if base.ndim == 2:
        return torch.addmm(base, a, b, alpha=scale, out=out)
    return torch.baddbmm(base, a, b, alpha=scale, out=out)
