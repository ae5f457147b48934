"""Adapted layers under transforms, modes, traces, hooks and patches."""

from __future__ import annotations

import functools
from contextlib import contextmanager, nullcontext
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.routing.steering import Override
from moe_lora.tuner.mixture_product.fast_path import can_fuse, is_plain_linear

E, R = 3, 2
SHAPES = {"tokens": (2, 4, 6), "vectors": (2, 6), "convolution": (2, 6, 4, 3)}
GIVEN = {
    "uniform": (None, None),
    "fixed": ([0.2, 0.5, 0.3], None),
    "sample": ([[0.2, 0.5, 0.3], [0.6, -0.1, 0.4]], None),
    "top-k": ([[0.0, -0.4, 0.6], [0.7, 0.3, 0.0]], 2),
}

close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        if kind == "convolution":
            self.first = nn.Conv2d(6, 5, 3, padding=1, dtype=torch.float64)
            self.second = nn.Conv2d(5, 6, 1, dtype=torch.float64)
        else:
            self.first = nn.Linear(6, 5, dtype=torch.float64)
            self.second = nn.Linear(5, 6, dtype=torch.float64)

    def forward(self, x):
        return x + self.second(self.first(x).tanh())


class Adapted:
    """A net with experts, and the same as a function of the plain formula."""

    def __init__(self, kind="tokens", given="uniform"):
        torch.manual_seed(0)
        self.net = Net(kind)
        config = MoELoraConfig(
            r=R, lora_alpha=3, target_modules=["first", "second"], init_lora_weights=False
        )
        self.model = get_peft_model(self.net, config, autocast_adapter_dtype=False)
        self.x = torch.randn(SHAPES[kind], dtype=torch.float64)
        weights, self.top_k = GIVEN[given]
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.learned = {n: p for n, p in self.net.named_parameters() if p.requires_grad}

    def routed(self):
        if self.weights is None:
            return nullcontext()
        return moe_lora.route(self.model, self.weights, top_k=self.top_k)

    def oracle(self, x):
        return x + self._layer(self.net.second, self._layer(self.net.first, x).tanh())

    def _layer(self, layer, x):
        experts, base = layer.moe_lora_experts["default"], layer.base_layer
        result = base._conv_forward(x, base.weight, base.bias) if x.ndim == 4 else base(x)
        for e in range(E):
            A, B = experts.lora_A[e], experts.lora_B[:, e]
            if x.ndim == 4:
                added = F.conv2d(base._conv_forward(x, A, None), B[..., None, None])
            else:
                added = x @ A.T @ B.T
            w = torch.tensor(1 / E) if self.weights is None else self.weights[..., e]
            w = w.view(-1, *[1] * (x.ndim - 1)) if w.ndim else w
            result = result + w * 3 / R * added
        return result


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).exp().sum()))(
        torch.stack([x, 2 * x])
    ),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](torch.ones_like(x)),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "jacobian": torch.autograd.functional.jacobian,
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "vectorized jacobian with a graph": lambda f, x: torch.autograd.grad(
        torch.autograd.functional.jacobian(f, x, vectorize=True, create_graph=True).exp().sum(), x
    )[0],
    "forward-mode jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "hvp": lambda f, x: torch.autograd.functional.hvp(
        lambda x: f(x).square().sum(), x, torch.ones_like(x)
    )[1],
    "functional jvp": lambda f, x: torch.autograd.functional.jvp(f, x, torch.ones_like(x))[1],
    "batched gradients": lambda f, x: torch.autograd.grad(
        f(x), x, torch.stack([torch.ones_like(x), x.detach()]), is_grads_batched=True
    )[0],
    "make_fx": lambda f, x: make_fx(f)(x)(2 * x),
    "symbolic make_fx": lambda f, x: make_fx(
        f, tracing_mode="symbolic", _allow_non_fake_inputs=True
    )(x)(2 * x),
    "pre-dispatch make_fx": lambda f, x: make_fx(f, pre_dispatch=True)(x)(2 * x),
}


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS["dual numbers"] = dual


def dual_cotangent(f, x):
    """Forward over a graph that was made before."""
    out = f(x)
    with forward_ad.dual_level():
        cotangent = forward_ad.make_dual(torch.ones_like(x), x.detach())
        return forward_ad.unpack_dual(torch.autograd.grad(out, x, cotangent)[0]).tangent


TRANSFORMS["dual cotangents"] = dual_cotangent


@pytest.mark.slow
@pytest.mark.parametrize("given", ["uniform", "sample", "top-k"])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_gives_what_it_gives_for_the_plain_formula(transform, kind, given):
    adapted = Adapted(kind, given)
    x = adapted.x.requires_grad_()
    with adapted.routed():
        found = transform(lambda x: adapted.net(x), x)
    close(found, transform(lambda x: adapted.oracle(x), x))
    with adapted.routed():  # and nothing of it stays
        close(adapted.model(x), adapted.oracle(x))


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", SHAPES)
def test_per_sample_gradients_of_the_experts(kind, given):
    adapted = Adapted(kind, given)

    def loss(learned, x):
        return torch.func.functional_call(adapted.net, learned, (x,)).square().sum()

    xs = torch.stack([adapted.x, 2 * adapted.x])
    with adapted.routed():
        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(adapted.learned, xs)
    for i, x in enumerate(xs):
        expected = torch.autograd.grad(
            adapted.oracle(x).square().sum(), list(adapted.learned.values())
        )
        for name, wanted in zip(adapted.learned, expected, strict=True):
            close(found[name][i], wanted)


def test_gradient_of_the_weights_under_a_transform():
    adapted = Adapted("tokens", "sample")

    def loss(weights):
        with moe_lora.route(adapted.model, weights):
            return adapted.model(adapted.x).square().sum()

    found = torch.func.grad(loss)(adapted.weights)
    hessian = torch.func.hessian(loss)(adapted.weights)
    adapted.weights.requires_grad_()
    expected = torch.autograd.grad(adapted.oracle(adapted.x).square().sum(), adapted.weights)[0]
    close(found, expected)
    close(hessian, torch.autograd.functional.hessian(loss, adapted.weights.detach()))


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_jit_trace_computes_for_other_inputs(kind, given):
    adapted = Adapted(kind, given)
    with adapted.routed():
        traced = torch.jit.trace(adapted.net, adapted.x)
    close(traced(3 * adapted.x), adapted.oracle(3 * adapted.x))


@pytest.mark.parametrize("kind", SHAPES)
def test_a_symbolic_trace_of_a_uniform_mixture(kind):
    adapted = Adapted(kind)
    traced = torch.fx.symbolic_trace(adapted.net)
    close(traced(3 * adapted.x), adapted.oracle(3 * adapted.x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_an_export_of_a_uniform_mixture(kind, strict):
    adapted = Adapted(kind)
    adapted.net(adapted.x)  # which adapters act is read off the layers outside of the graph
    exported = torch.export.export(adapted.net, (adapted.x,), strict=strict).module()
    close(exported(3 * adapted.x), adapted.oracle(3 * adapted.x))


@pytest.mark.parametrize("given", ["uniform", "sample", "top-k"])
@pytest.mark.parametrize("kind", SHAPES)
def test_fake_tensors_have_the_shapes_of_the_output(kind, given):
    adapted = Adapted(kind, given)
    with adapted.routed(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(adapted.x.requires_grad_())
        out = adapted.model(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.shape == grad.shape == adapted.x.shape
    close(adapted.model(adapted.x).shape, adapted.x.shape)


def test_a_model_of_fake_tensors():
    adapted = Adapted("tokens", "sample")
    with FakeTensorMode() as mode:
        x, weights = (mode.from_tensor(t) for t in (adapted.x, adapted.weights))
        learned = {
            name: mode.from_tensor(p, static_shapes=True)
            for name, p in adapted.net.named_parameters()
        }
    # `moe_lora.route` would look at values.
    state = moe_lora.routing.control.routing_state(adapted.model)
    with state.steer(override=Override(weights)), mode:
        out = torch.func.functional_call(adapted.net, learned, (x,))
    assert out.shape == x.shape


@pytest.mark.parametrize("given", GIVEN)
def test_all_products_are_counted(given):
    adapted = Adapted("tokens", given)
    tokens, width = 2 * 4, R * (adapted.top_k or E)
    base, experts = 2 * 2 * tokens * 6 * 5, 2 * 2 * tokens * width * (6 + 5)
    with adapted.routed():
        with FlopCounterMode(display=False) as counter:
            out = adapted.model(adapted.x.requires_grad_())
        assert counter.get_total_flops() == base + experts
        with FlopCounterMode(display=False) as counter:
            adapted.model(adapted.x).sum().backward()
        forward_too = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
    assert counter.get_total_flops() == forward_too - base - experts
    fast = adapted.model(adapted.x)
    with FlopCounterMode(display=False) as counter:
        fast.sum().backward()
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("saved", ["products", "everything"])
def test_selective_checkpointing(kind, given, saved):
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    products |= {torch.ops.aten.bmm.default, torch.ops.aten.convolution.default}

    def policy(context, op, *args, **kwargs):
        if saved == "everything" or op in products:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    adapted = Adapted(kind, given)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    learned = [adapted.x.requires_grad_(), *adapted.learned.values()]
    with adapted.routed():
        out = checkpoint(adapted.model, adapted.x, use_reentrant=False, context_fn=contexts)
        found = torch.autograd.grad(out.square().sum(), learned)
    expected = torch.autograd.grad(adapted.oracle(adapted.x).square().sum(), learned)
    for got, wanted in zip(found, expected, strict=True):
        close(got, wanted)


def doubled(original):
    return lambda *args, **kwargs: 2 * original(*args, **kwargs)


class DoublingMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        return 2 * out if function is F.linear and args[1].shape == (5, 6) else out


@contextmanager
def global_hook(register, hook):
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def patched(owner, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, doubled(getattr(owner, name)))
        yield


BASE = nn.Linear(6, 5).requires_grad_(False)


def base_is(module):
    return module is BASE


WATCHERS = {
    "forward hook on all modules": lambda: global_hook(
        register_module_forward_hook, lambda m, args, out: 2 * out if base_is(m) else None
    ),
    "forward pre-hook on all modules": lambda: global_hook(
        register_module_forward_pre_hook, lambda m, args: (2 * args[0],) if base_is(m) else None
    ),
    "backward hook on all modules": lambda: global_hook(
        register_module_full_backward_hook,
        lambda m, inner, outer: tuple(2 * g for g in inner) if base_is(m) else None,
    ),
    "backward pre-hook on all modules": lambda: global_hook(
        register_module_full_backward_pre_hook,
        lambda m, outer: tuple(2 * g for g in outer) if base_is(m) else None,
    ),
    "forward of all linear layers": lambda: patched(nn.Linear, "forward"),
    "call of the base": lambda: patched(BASE, "_call_impl"),
    "forward of the base": lambda: patched(BASE, "forward"),
    "function mode": DoublingMode,
    "forward hook": lambda: global_hook(BASE.register_forward_hook, lambda m, args, out: 2 * out),
    "forward pre-hook": lambda: global_hook(
        BASE.register_forward_pre_hook, lambda m, args: (2 * args[0],)
    ),
    "backward hook": lambda: global_hook(
        BASE.register_full_backward_hook, lambda m, inner, outer: tuple(2 * g for g in inner)
    ),
    "backward pre-hook": lambda: global_hook(
        BASE.register_full_backward_pre_hook, lambda m, outer: tuple(2 * g for g in outer)
    ),
}


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6)])
@pytest.mark.parametrize("watcher", WATCHERS.values(), ids=WATCHERS)
def test_hooks_and_patches_of_the_base_layer_are_called(watcher, shape):
    config = MoELoraConfig(r=R, lora_alpha=R, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(BASE), config)
    x = torch.randn(shape, requires_grad=True)

    def results(out):
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    plain = results(model(x))
    with watcher():
        watched = results(model(x))
        experts = model.base_model.model[0].moe_lora_experts["default"]
        expected = results(BASE(x) + moe_lora.tuner.mixture(x, experts.lora_A, experts.lora_B))
    for found, wanted in zip(watched, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(results(model(x)), plain, strict=True))


class Logged(torch.Tensor):
    """A tensor subclass that notes the functions which it meets."""

    functions: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.functions.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", SHAPES)
def test_a_tensor_subclass_stays_one(kind):
    adapted = Adapted(kind, "sample")
    Logged.functions.clear()
    with adapted.routed():
        out = adapted.model(adapted.x.as_subclass(Logged))
    assert type(out) is Logged
    close(out.as_subclass(torch.Tensor), adapted.oracle(adapted.x))
    if kind != "convolution":
        assert Logged.functions.count(F.linear) == 2 * 3  # the base's, A and B of two layers


def test_fusing_is_possible_by_default_and_under_a_default_device():
    x = torch.randn(2, 6)
    assert can_fuse(x, nn.Parameter(x), None)
    assert is_plain_linear(BASE)
    with torch.device("cpu"):
        assert can_fuse(x)
        with DoublingMode():
            assert not can_fuse(x)
    with patched(F, "linear"):
        assert not can_fuse(x)
    for owner, name in ((nn.Module, "__call__"), (nn.Linear, "forward")):
        with patched(owner, name):
            assert not is_plain_linear(BASE)
    assert not can_fuse(x.as_subclass(Logged))
    assert not is_plain_linear(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)))
    assert not is_plain_linear(nn.Linear(6, 5))
    compiled = nn.Linear(6, 5).requires_grad_(False)
    compiled.compile(backend="eager")
    assert not is_plain_linear(compiled)


@pytest.fixture
def flux(make_flux, flux_targets):
    model = make_flux()
    plain = make_flux()
    model.add_adapter(MoELoraConfig(r=2, target_modules=flux_targets, init_lora_weights=False))
    return model, plain


@pytest.mark.parametrize("given", ["uniform", "sample"])
def test_transforms_of_flux(flux, make_flux_inputs, given):
    model, inputs = flux[0], make_flux_inputs()
    x = inputs.pop("hidden_states")
    weights = GIVEN[given][0]
    u, v = torch.randn(2, x.shape[1], 64), torch.randn_like(x)

    def run(x):
        return model(hidden_states=x, **inputs, return_dict=False)[0]

    routed = nullcontext() if weights is None else moe_lora.route(model, torch.tensor(weights))
    # Of the kernels of attention on a CPU only this one has forward-mode derivatives.
    with routed, sdpa_kernel(SDPBackend.MATH):
        out, forward = torch.func.jvp(run, (x,), (v,))
        (reverse,) = torch.func.vjp(run, x)[1](u)
        x = x.requires_grad_()
        eager = run(x)
        (expected,) = torch.autograd.grad(eager, x, u)
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reverse, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close((forward * u).sum(), (expected * v).sum(), rtol=1e-3, atol=1e-3)


def test_flops_and_export_of_flux(flux, make_flux_inputs):
    model, plain = flux
    inputs = make_flux_inputs()
    found = []
    for either in (plain, model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            either(**inputs)
        found.append(counter.get_total_flops())
    rows = {}

    def note(module, args, out):
        if hasattr(module, "moe_lora_experts"):
            rows[module] = args[0][..., 0].numel()

    with global_hook(register_module_forward_hook, note):
        expected = model(**inputs)[0]
    experts = sum(2 * n * E * 2 * (m.in_features + m.out_features) for m, n in rows.items())
    assert len(rows) > 10
    assert found[1] - found[0] == experts
    exported = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(exported(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
