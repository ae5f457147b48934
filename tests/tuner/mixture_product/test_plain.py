from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from moe_lora.routing.weights.fitting.layer import align_weights
from moe_lora.tuner import mixture
from moe_lora.tuner.mixture_product.fused import add_mixture
from moe_lora.tuner.mixture_product.plain import LinearParameters, mixture_operands

E, R, D_IN, D_OUT = 3, 4, 6, 5
SHAPES = {"(B, D)": (2, D_IN), "(B, T, D)": (2, 7, D_IN), "(B, H, W, D)": (2, 3, 4, D_IN)}


def experts_loop(x, lora_A, lora_B, weights, scaling):
    """y = sum_e w_e * s * B_e (A_e x), one sample, one token, one expert at a time."""
    y = torch.zeros(*x.shape[:-1], lora_B.shape[0], dtype=x.dtype)
    for index in torch.cartesian_prod(*[torch.arange(n) for n in x.shape[:-1]]).reshape(
        -1, x.ndim - 1
    ):
        at = tuple(index.tolist())
        for e in range(lora_A.shape[0]):
            if weights is None:
                w = 1 / lora_A.shape[0]
            elif weights.ndim == 2:
                w = weights[at[0], e]
            else:
                token = 0
                for n, i in zip(x.shape[1:-1], at[1:], strict=True):
                    token = token * n + i
                w = weights[at[0], token, e] if x.ndim > 2 else weights[at[0], :, e].mean()
            y[at] += w * scaling * (lora_B[:, e] @ (lora_A[e] @ x[at]))
    return y


def draw(shape, dtype):
    x = torch.randn(shape, dtype=dtype)
    lora_A = torch.randn(E, R, D_IN, dtype=dtype)
    lora_B = torch.randn(D_OUT, E, R, dtype=dtype)
    return x, lora_A, lora_B


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["sample", "token", "uniform"])
def test_the_mixture_equals_the_loop_over_experts(dtype, shape, kind, tolerance):
    x, lora_A, lora_B = draw(shape, dtype)
    tokens = max(1, x[0, ..., 0].numel())
    weights = {
        "sample": torch.rand(2, E, dtype=dtype).softmax(-1),
        "token": torch.rand(2, tokens if x.ndim > 2 else 4, E, dtype=dtype).softmax(-1),
        "uniform": None,
    }[kind]
    aligned = None if weights is None else align_weights(weights, x)
    found = mixture(x, lora_A, lora_B, aligned, scaling=0.5)
    expected = experts_loop(x, lora_A, lora_B, weights, 0.5)
    torch.testing.assert_close(found, expected, rtol=tolerance[dtype], atol=tolerance[dtype])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_reach_experts_and_weights(shape):
    x, lora_A, lora_B = draw(shape, torch.float64)
    weights = torch.rand(2, E, dtype=torch.float64).softmax(-1)

    def run(x, lora_A, lora_B, weights):
        return mixture(x, lora_A, lora_B, align_weights(weights, x), 0.5)

    inputs = [t.requires_grad_() for t in (x, lora_A, lora_B, weights)]
    assert torch.autograd.gradcheck(run, inputs)


def test_a_batch_equals_its_samples_one_by_one():
    for shape in SHAPES.values():
        x, lora_A, lora_B = draw(shape, torch.float64)
        w = torch.rand(2, E, dtype=torch.float64)
        whole = mixture(x, lora_A, lora_B, align_weights(w, x))
        for i in range(2):
            one = mixture(x[i : i + 1], lora_A, lora_B, align_weights(w[i : i + 1], x[i : i + 1]))
            torch.testing.assert_close(whole[i : i + 1], one, rtol=1e-10, atol=1e-10)


def base_of(kind, x, weight, bias):
    return LinearParameters(weight, bias) if kind == "layer" else F.linear(x, weight, bias)


@pytest.mark.parametrize("base", ["output", "layer"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["sample", "token", "fixed", "uniform"])
def test_adding_to_the_base_equals_the_sum_with_all_its_gradients(base, shape, kind):
    x, lora_A, lora_B = draw(shape, torch.float64)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    bias = torch.randn(D_OUT, dtype=torch.float64)
    tokens = max(1, x[0, ..., 0].numel())
    sizes = {"sample": (2, E), "token": (2, tokens, E), "fixed": (E,)}
    weights = None if kind == "uniform" else torch.rand(sizes[kind], dtype=torch.float64)

    def run(x, lora_A, lora_B, *weights):
        w = align_weights(weights[0], x) if weights else None
        mix = mixture_operands(lora_A, lora_B, w, 0.5)
        return add_mixture(x, mix, base_of(base, x, weight, bias))

    inputs = [t.requires_grad_() for t in (x, lora_A, lora_B, weights) if t is not None]
    aligned = None if weights is None else align_weights(weights, x)
    expected = F.linear(x, weight, bias) + mixture(x, lora_A, lora_B, aligned, 0.5)
    torch.testing.assert_close(run(*inputs), expected, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("base", ["output", "layer"])
@pytest.mark.parametrize("shape", [(2, 7, D_IN), (2, 3, 4, D_IN)])
@pytest.mark.parametrize("k", [1, 2])
def test_chosen_experts_equal_all_experts_of_which_the_others_weigh_nothing(base, shape, k):
    x, lora_A, lora_B = draw(shape, torch.float64)
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    logits = torch.tensor([[0.1, 2.0, 1.0], [3.0, -1.0, 0.5]], dtype=torch.float64)
    expert_indices = logits.topk(k).indices
    assert not torch.equal(*expert_indices)
    aligned = expert_indices.view(2, *[1] * (len(shape) - 2), k)
    w = torch.zeros_like(logits).scatter(-1, expert_indices, logits.gather(-1, expert_indices))
    inputs = [t.requires_grad_() for t in (x, lora_A, lora_B, w)]

    def dense(x, lora_A, lora_B, w):
        return F.linear(x, weight) + mixture(x, lora_A, lora_B, align_weights(w, x), 0.5)

    def sparse(x, lora_A, lora_B, w):
        mix = mixture_operands(lora_A, lora_B, align_weights(w, x), 0.5, aligned)
        return add_mixture(x, mix, base_of(base, x, weight, None))

    results = []
    for run in (dense, sparse):
        out = run(*inputs)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad(out, inputs, grad)])
    results[0][4] = results[0][4] * (w != 0)  # an expert that is not computed passes no gradient
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_only_what_needs_a_gradient_gets_one():
    names = ("x", "lora_A", "lora_B", "weights", "base")
    for wanted in itertools.chain(*(itertools.combinations(names, n) for n in (1, 2))):
        x, lora_A, lora_B = draw((2, 7, D_IN), torch.float64)
        tensors = dict(zip(names, (x, lora_A, lora_B, torch.rand(2, 1, E).double()), strict=False))
        tensors["base"] = torch.randn(2, 7, D_OUT, dtype=torch.float64)
        for name in wanted:
            tensors[name].requires_grad_()
        mix = mixture_operands(tensors["lora_A"], tensors["lora_B"], tensors["weights"], 1.0)
        add_mixture(tensors["x"], mix, tensors["base"]).square().sum().backward()
        assert {n for n, t in tensors.items() if t.grad is not None} == set(wanted)


@pytest.mark.parametrize("k", [None, 2])
def test_little_is_kept_for_the_backward_pass(k):
    x, lora_A, lora_B = (t.requires_grad_() for t in draw((2, 50, D_IN), torch.float32))
    weight = torch.randn(D_OUT, D_IN)
    w = torch.rand(2, 1, E).requires_grad_()
    expert_indices = None if k is None else w.detach().topk(k).indices
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = add_mixture(
            x,
            mixture_operands(lora_A, lora_B, w, 1.0, expert_indices),
            LinearParameters(weight, None),
        )
    assert out.requires_grad
    known = [t for t in (x, lora_A, lora_B, weight, expert_indices) if t is not None]
    own = {t.untyped_storage().data_ptr() for t in known}
    others = [t for t in kept if t.untyped_storage().data_ptr() not in own]
    # A x, once, and of routing weights and gate what is small anyway.
    tokens = [t for t in others if t.numel() >= 50]
    assert sum(t.numel() for t in tokens) == 2 * 50 * (k or E) * R
    assert sum(t.numel() for t in others if t.numel() < 50) <= 4 * w.numel()


@pytest.mark.parametrize("base", ["output", "layer"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_sum_may_be_modified_in_place(base, shape):
    x, lora_A, lora_B = (t.requires_grad_() for t in draw(shape, torch.float64))
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    grads = []
    for in_place in (False, True):
        added = add_mixture(
            x, mixture_operands(lora_A, lora_B, None, 1.0), base_of(base, x, weight, None)
        )
        if in_place:
            added += 1
            added.relu_()
        else:
            added = (added + 1).relu()
        grads.append(torch.autograd.grad(added.square().sum(), [x, lora_A, lora_B]))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


EXPERT_GRAD_MASK = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["sample", "uniform"])
def test_the_gradient_mask_blocks_the_parameters_of_experts_only(
    shape, kind, compiling, monkeypatch
):
    x, lora_A, lora_B = (t.requires_grad_() for t in draw(shape, torch.float64))
    weight = torch.randn(D_OUT, D_IN, dtype=torch.float64)
    w = torch.rand(2, E, dtype=torch.float64).requires_grad_() if kind == "sample" else None
    inputs = [t for t in (x, lora_A, lora_B, w) if t is not None]
    pattern = torch.randn(*shape[:-1], D_OUT, dtype=torch.float64)

    def gradients(rows, expert_grad_mask):
        aligned = None if w is None else align_weights(w[rows], x[rows])
        known = None if expert_grad_mask is None else align_weights(expert_grad_mask[rows], x[rows])
        mix = mixture_operands(lora_A, lora_B, aligned, 0.5, expert_grad_mask=known)
        out = add_mixture(x[rows], mix, LinearParameters(weight, None))
        return out, torch.autograd.grad(out, inputs, pattern[rows])

    plain, expected = gradients(slice(None), None)
    one_by_one = [gradients(slice(i, i + 1), None)[1] for i in range(2)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    out, found = gradients(slice(None), EXPERT_GRAD_MASK)
    torch.testing.assert_close(out, plain, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    of_A = sum(g[1] * EXPERT_GRAD_MASK[i].view(-1, 1, 1) for i, g in enumerate(one_by_one))
    of_B = sum(g[2] * EXPERT_GRAD_MASK[i].view(1, -1, 1) for i, g in enumerate(one_by_one))
    torch.testing.assert_close(found[1], of_A, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[2], of_B, rtol=1e-10, atol=1e-10)
    if w is not None:
        torch.testing.assert_close(found[3], expected[3], rtol=1e-10, atol=1e-10)


def test_the_gradient_mask_applies_to_selected_experts():
    x, lora_A, lora_B = (t.requires_grad_() for t in draw((2, 7, D_IN), torch.float64))
    base = torch.randn(2, 7, D_OUT, dtype=torch.float64)
    w = torch.tensor([[0.0, 0.4, 0.6], [0.7, 0.3, 0.0]], dtype=torch.float64).unsqueeze(1)
    results = []
    for expert_indices in (None, w.topk(2).indices):
        mix = mixture_operands(
            lora_A, lora_B, w, 0.5, expert_indices, EXPERT_GRAD_MASK.unsqueeze(1)
        )
        out = add_mixture(x, mix, base)
        results.append(torch.autograd.grad(out.square().sum(), [x, lora_A, lora_B]))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
