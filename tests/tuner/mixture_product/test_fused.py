"""The fused operations against the plain formula, for every combination of operands."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from moe_lora.tuner.mixture_product.fast_path import can_fuse
from moe_lora.tuner.mixture_product.fused import add_mixture
from moe_lora.tuner.mixture_product.plain import LinearParameters, mixture_operands

E, R, D_IN, D_OUT = 3, 2, 4, 5
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}
EXPERT_GRAD_MASK = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
EXPERT_INDICES = torch.tensor([[0, 2], [2, 1]])


class PlainMode(TorchFunctionMode):
    """A mode that changes nothing, with which nothing is fused."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextmanager
def plainly():
    with PlainMode():
        assert not can_fuse()
        yield


def weights_of(kind, shape):
    positions = shape[1:-1]
    sizes = {
        "fixed": (E,),
        "sample": (shape[0], *[1] * len(positions), E),
        "token": (*shape[:-1], E),
        "row": (shape[0], *positions[:1], *[1] * (len(positions) - 1), E),
    }
    return None if kind == "uniform" else torch.rand(sizes[kind], dtype=torch.float64) - 0.3


def expand_to(tensor, shape):
    """Reshape a tensor per sample to broadcast against an input."""
    return tensor.view(tensor.shape[0], *[1] * (len(shape) - 2), tensor.shape[-1])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    shape=st.sampled_from([(2, D_IN), (2, 3, D_IN), (2, 2, 3, D_IN), (0, 3, D_IN), (2, 0, D_IN)]),
    kind=st.sampled_from(["uniform", "fixed", "sample", "token", "row"]),
    choose=st.booleans(),
    use_mask=st.booleans(),
    layer=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    expert_dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    autocast=st.sampled_from([None, torch.bfloat16, torch.float16]),
    frozen=st.sets(st.sampled_from(["x", "lora_A", "lora_B", "weights"])),
    seed=st.integers(0, 2**31),
)
def test_fused_and_plain_operations_agree(
    shape, kind, choose, use_mask, layer, bias, dtype, expert_dtype, autocast, frozen, seed
):
    torch.manual_seed(seed)
    batch = shape[0]
    operands = {
        "x": torch.randn(shape).to(dtype),
        "lora_A": torch.randn(E, R, D_IN).to(expert_dtype),
        "lora_B": torch.randn(D_OUT, E, R).to(expert_dtype),
        "weights": weights_of(kind, shape),
    }
    operands["weights"] = None if kind == "uniform" else operands["weights"].float()
    weight, offset = torch.randn(D_OUT, D_IN).to(dtype), torch.randn(D_OUT).to(dtype)
    base = LinearParameters(weight, offset if bias else None)
    if not layer:
        base = torch.randn(*shape[:-1], D_OUT).to(dtype)
    # Layers choose for tokens of samples of which each has weights of its own.
    choose = choose and kind == "sample" and len(shape) > 2
    expert_indices = expand_to(EXPERT_INDICES[:batch], shape) if choose else None
    expert_grad_mask = expand_to(EXPERT_GRAD_MASK[:batch].float(), shape) if use_mask else None
    learned = {n: t for n, t in operands.items() if t is not None and n not in frozen}
    for tensor in learned.values():
        tensor.requires_grad_()

    def results():
        x, lora_A, lora_B, weights = operands.values()
        mix = mixture_operands(lora_A, lora_B, weights, 0.5, expert_indices, expert_grad_mask)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = add_mixture(x, mix, base)
        if not learned:
            return [out]
        cotangent = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
        return [out, *torch.autograd.grad(out, list(learned.values()), cotangent)]

    fused = results()
    with plainly():
        plain = results()
    dtypes = {dtype, expert_dtype, torch.float32 if kind != "uniform" else dtype}
    lowest = max(TOLERANCE[t] for t in dtypes)
    for found, expected in zip(fused, plain, strict=True):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        if expected.numel() == 0:
            continue
        tolerance = 2 * lowest * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("shape", [(2, D_IN), (2, 3, D_IN)])
@pytest.mark.parametrize("kind", ["uniform", "fixed", "sample", "token"])
@pytest.mark.parametrize("choose", [False, True])
def test_second_derivatives(kind, shape, choose, layer):
    if choose and (kind != "sample" or len(shape) == 2):
        pytest.skip("layers choose for tokens of samples only")
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    expert_indices = expand_to(EXPERT_INDICES, shape) if choose else None

    def run(x, lora_A, lora_B, base, *weights):
        mix = mixture_operands(lora_A, lora_B, weights[0] if weights else None, 0.5, expert_indices)
        return add_mixture(x, mix, LinearParameters(weight, None) if layer else base)

    inputs = [torch.randn(s, dtype=torch.float64) for s in (shape, (E, R, D_IN), (D_OUT, E, R))]
    inputs.append(torch.randn(*shape[:-1], D_OUT, dtype=torch.float64))
    inputs += [] if kind == "uniform" else [weights_of(kind, shape)]
    frozen = 3 if layer else None
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i != frozen)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    for wanted in itertools.combinations([i for i in range(len(inputs)) if i != frozen], 2):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        assert torch.autograd.gradgradcheck(run, some, fast_mode=True)


def test_weights_that_depend_on_the_input_are_differentiated_twice():
    x = torch.randn(2, 3, D_IN, dtype=torch.float64, requires_grad=True)
    lora_A = torch.randn(E, R, D_IN, dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(D_OUT, E, R, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)

    def run(x, lora_A, lora_B):
        weights = x.mean(1, keepdim=True)[..., :E].softmax(-1)
        return add_mixture(
            x, mixture_operands(lora_A, lora_B, weights, 0.5), LinearParameters(weight, None)
        )

    assert torch.autograd.gradcheck(run, (x, lora_A, lora_B))
    assert torch.autograd.gradgradcheck(run, (x, lora_A, lora_B))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "fixed", "sample"])
@pytest.mark.parametrize("choose", [False, True])
@pytest.mark.parametrize("shape", [(2, D_IN), (2, 3, D_IN), (2, 2, 3, D_IN)])
def test_masked_experts_get_no_gradient_of_any_order(shape, choose, kind, plain):
    if choose and (kind != "sample" or len(shape) == 2):
        pytest.skip("layers choose for tokens of samples only")
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = weights_of(kind, shape)
    if weights is not None:
        weights.requires_grad_()
    lora_A = torch.randn(E, R, D_IN, dtype=torch.float64, requires_grad=True)
    lora_B = torch.randn(D_OUT, E, R, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    expert_indices = expand_to(EXPERT_INDICES, shape) if choose else None

    def penalty(A, B, expert_grad_mask):
        mix = mixture_operands(A, B, weights, 0.5, expert_indices, expert_grad_mask)
        out = add_mixture(x, mix, LinearParameters(weight, None))
        others = [x] if weights is None else [x, weights]
        grads = torch.autograd.grad(out.square().sum(), others, create_graph=True)
        return sum(g.square().sum() for g in grads)

    def gradients(expert_grad_mask):
        return torch.autograd.grad(penalty(lora_A, lora_B, expert_grad_mask), [lora_A, lora_B, x])

    def oracle():
        """Every sample separately, with the masked experts as constants."""
        if kind == "fixed":
            return None  # the penalty on shared weights is no sum over samples
        total = [torch.zeros_like(t) for t in (lora_A, lora_B, x)]
        for i, row in enumerate(EXPERT_GRAD_MASK):
            one = x[i : i + 1].detach().requires_grad_()
            A = torch.stack([a if t else a.detach() for a, t in zip(lora_A, row, strict=True)])
            B = torch.stack(
                [b if t else b.detach() for b, t in zip(lora_B.unbind(1), row, strict=True)], 1
            )
            w = torch.full((E,), 1 / E, dtype=torch.float64)
            if weights is not None:
                w = weights.detach()[i : i + 1].requires_grad_()
            kept = w
            if choose:
                kept = w * torch.zeros(E).double().index_fill(0, EXPERT_INDICES[i], 1.0)
            out = one @ weight.T
            for e in range(E):
                out = out + 0.5 * kept[..., e, None] * (one @ A[e].T @ B[:, e].T)
            others = [one] if weights is None else [one, w]
            grads = torch.autograd.grad(out.square().sum(), others, create_graph=True)
            value = sum(g.square().sum() for g in grads)
            found = torch.autograd.grad(value, [lora_A, lora_B, one])
            total[0], total[1] = total[0] + found[0], total[1] + found[1]
            total[2][i] = found[2][0]
        return total

    if plain:
        with plainly():
            found = gradients(expand_to(EXPERT_GRAD_MASK, shape))
    else:
        found = gradients(expand_to(EXPERT_GRAD_MASK, shape))
    nobody = gradients(torch.zeros_like(expand_to(EXPERT_GRAD_MASK, shape)))
    assert not nobody[0].any()
    assert not nobody[1].any()
    torch.testing.assert_close(found[2], nobody[2], rtol=1e-9, atol=1e-9)
    wanted = oracle()
    if wanted is not None:
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
