"""Convolutions with experts: paddings, memory formats, empty batches, against the slow sum."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

import moe_lora
from moe_lora import MoELoraConfig

E, R = 3, 2
KINDS = {
    "1x1": {"kernel_size": 1},
    "strided 1x1": {"kernel_size": 1, "stride": 2, "bias": False},
    "non-square": {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0)},
    "same": {"kernel_size": (3, 5), "padding": "same"},
    "same, even": {"kernel_size": (2, 4), "padding": "same"},
    "same, dilated": {"kernel_size": 3, "padding": "same", "dilation": (2, 1)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "circular"},
    "replicate": {"kernel_size": 3, "padding": 1, "padding_mode": "replicate", "stride": 2},
    "same, circular": {"kernel_size": (3, 2), "padding": "same", "padding_mode": "circular"},
    "same, reflect, dilated": {
        "kernel_size": 3,
        "padding": "same",
        "padding_mode": "reflect",
        "dilation": 2,
    },
}
WEIGHTS = {
    "uniform": (None, None),
    "fixed": ((E,), None),
    "sample": ((2, E), None),
    "top-k": ((2, E), 2),
}


def adapted(dtype=torch.float64, **kwargs):
    config = MoELoraConfig(r=R, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
    net = nn.Sequential(nn.Conv2d(4, 5, **kwargs).to(dtype))
    return get_peft_model(net, config, autocast_adapter_dtype=False)


def drawn(shape, top_k, batch=2):
    if shape is None:
        return None
    weights = torch.rand(shape if len(shape) == 1 else (batch, E), dtype=torch.float64) - 0.2
    if top_k is not None and batch:
        weights = weights * torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])[:batch]
    return weights.requires_grad_()


def slow(model, x, weights):
    """Convolve every sample with the base's weight, and with B A of every expert."""
    layer = model.base_model.model[0]
    base, experts = layer.base_layer, layer.moe_lora_experts["default"]
    rows = []
    for i in range(x.shape[0]):
        row = base(x[i : i + 1])
        for e in range(E):
            w = 1 / E if weights is None else weights[..., e].expand(x.shape[0])[i]
            delta = torch.einsum("or,rihw->oihw", experts.lora_B[:, e], experts.lora_A[e])
            row = row + w * 3 / R * base._conv_forward(x[i : i + 1], delta, None)
        rows.append(row)
    return torch.cat(rows)


def routed(model, weights, top_k):
    return nullcontext() if weights is None else moe_lora.route(model, weights, top_k=top_k)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)
def test_output_and_gradients_are_those_of_the_slow_sum(kwargs, weights, channels_last):
    model, (shape, k) = adapted(**kwargs), weights
    given = drawn(shape, k)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    learned = [x, *(p for p in model.parameters() if p.requires_grad)]
    learned += [] if given is None else [given]
    with routed(model, given, k):
        out = model(x)
    expected = slow(model, x, given)
    # Circular padding alone loses the memory format, as it does in the base layer.
    kept = channels_last and kwargs.get("padding_mode") != "circular"
    assert out.is_contiguous(memory_format=torch.channels_last) or not kept
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.randn_like(out)
    found = torch.autograd.grad(out, learned, cotangent)
    wanted = list(torch.autograd.grad(expected, learned, cotangent))
    if k is not None:
        wanted[-1] = wanted[-1] * (given != 0)
    for got, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_half_precision_with_and_without_autocast(dtype, autocast):
    model = adapted(kernel_size=3, padding=1)
    x, given = torch.randn(2, 4, 7, 8, dtype=torch.float64), drawn((2, E), None).detach()
    expected = slow(model, x, given)
    layer = model.base_model.model[0]
    layer.moe_lora_experts.float()
    layer.base_layer.to(dtype)
    with (
        moe_lora.route(model, given.float()),
        torch.autocast("cpu", autocast or dtype, enabled=autocast is not None),
    ):
        out = model(x.to(dtype))
    assert out.dtype == (autocast or dtype)
    torch.testing.assert_close(out.double(), expected, rtol=5e-2, atol=1e-1)
    out.float().square().sum().backward()
    for parameter in layer.moe_lora_experts.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


EMPTY = {
    "tokens": (lambda: nn.Linear(4, 5), (7, 4)),
    "image": (lambda: nn.Linear(4, 5), (3, 2, 4)),
    "modulation": (lambda: nn.Linear(4, 5), (4,)),
    "convolution": (lambda: nn.Conv2d(4, 5, 3, padding=1), (4, 3, 2)),
}
OF_NOBODY = {
    "uniform": (None, None),
    "fixed": ((E,), None),
    "sample": ((0, E), None),
    "hard": ((0, E), 1),
    "top-k": ((0, E), 2),
    "token": ((0, 6, E), None),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weights", OF_NOBODY.values(), ids=OF_NOBODY)
@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_batch_has_an_empty_output_and_gradients_of_zero(kind, weights, masked):
    make, shape = EMPTY[kind]
    given, k = weights
    if given == (0, 6, E) and kind == "tokens":
        given = (0, 7, E)
    config = MoELoraConfig(r=R, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(make()), config)
    x = torch.randn(0, *shape, requires_grad=True)
    given = None if given is None else torch.rand(given).requires_grad_()
    use_mask = moe_lora.routing.teach_experts(model, torch.ones(0, E)) if masked else nullcontext()
    with routed(model, given, k), use_mask:
        out = model(x)
    assert out.shape == model.base_model.model[0].base_layer(x).shape
    out.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in model.parameters():
        assert not parameter.requires_grad or not parameter.grad.any()
    assert given is None or not given.grad.any()


class ByMean(moe_lora.Router):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, E)

    def logits(self, inputs):
        return self.linear(inputs.hidden_states.mean(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, hidden_states):
        return self.layer(hidden_states)


@pytest.mark.parametrize("gate", [{}, {"routing_strategy": "hard"}, {"top_k": 2}])
def test_a_router_of_an_empty_batch(gate):
    gate = {"routing_strategy": "topk", **gate} if "top_k" in gate else gate
    config = MoELoraConfig(r=R, target_modules=["layer"], init_lora_weights=False, **gate)
    model = get_peft_model(Net(), config)
    moe_lora.attach_router(model, ByMean())
    out = model(hidden_states=torch.randn(0, 3, 4))
    out.sum().backward()
    assert out.shape == (0, 3, 5)
    stats = moe_lora.routing_stats(model)
    assert stats.usage == [0, 0, 0]
    model(hidden_states=torch.randn(2, 3, 4))
    assert sum(stats.usage) == 2
    assert F.softmax(torch.tensor(stats.mean_weights), -1).isfinite().all()
