from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_lora
from moe_lora import MoELoraConfig


def flux(make_flux, targets, checkpointing):
    model = make_flux(layers=2).eval()
    torch.manual_seed(2)
    model.add_adapter(
        MoELoraConfig(
            r=4,
            target_modules=targets,
            router="three_expert_removal",
            init_lora_weights=False,
        )
    )
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model


def gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("forwards", [1, 2])
def test_checkpointing_changes_no_gradient(make_flux, make_flux_inputs, flux_targets, forwards):
    results = []
    for checkpointing in (False, True):
        model = flux(make_flux, flux_targets, checkpointing)
        loss = 0.0
        for step in range(forwards):
            inputs = make_flux_inputs()
            inputs["hidden_states"][:, : 8 * step, 128:] = 1.0
            loss = loss + (1 + 5 * step) * model(**inputs)[0].square().mean()
        loss.backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0])


def test_a_forward_without_gradient_in_between_does_no_harm(
    make_flux, make_flux_inputs, flux_targets
):
    results = []
    for checkpointing in (False, True):
        model = flux(make_flux, flux_targets, checkpointing)
        loss = model(**make_flux_inputs())[0].square().mean()
        with torch.no_grad():
            model(**make_flux_inputs(batch=1))
        loss.backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0])


class Checkpointed(nn.Module):
    """A block that checkpoints its layers by itself, as training code outside diffusers does."""

    def __init__(self, function=checkpoint, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function, self.kwargs = function, kwargs

    def block(self, x):
        return self.second(self.first(x).tanh())

    def forward(self, x):
        return self.function(self.block, x, **self.kwargs)


def adapted(model):
    torch.manual_seed(1)
    config = MoELoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    return get_peft_model(model, config)


def run_twice(model, w):
    x = torch.linspace(-1, 1, 8).view(2, 4)
    loss = 0.0
    for weights in (w.softmax(-1), w.flip(-1).softmax(-1)):
        with moe_lora.route(model, weights):
            loss = loss + model(x).square().mean()
    loss.backward()


def direct(block, *args, **kwargs):
    return block(*args)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_plain_checkpointing_over_several_forwards_is_right(requires_grad):
    results = []
    for model in (adapted(Checkpointed(direct)), adapted(Checkpointed(use_reentrant=False))):
        w = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=requires_grad)
        run_twice(model, w)
        results.append(gradients(model) | ({"w": w.grad} if requires_grad else {}))
    assert_same_gradients(results[1], results[0])


def test_routed_checkpoint_keeps_the_weights_of_each_forward():
    results = []
    for routed in (False, True):
        model = adapted(Checkpointed(direct))
        if routed:
            inner = model.base_model.model
            inner.function = moe_lora.routing.routed_checkpoint(model)
            inner.kwargs = {"use_reentrant": False}
        w = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
        run_twice(model, w)
        results.append({**gradients(model), "w": w.grad})
    assert_same_gradients(results[1], results[0])
    assert results[0]["w"].abs().sum() > 0


def test_plain_checkpointing_of_one_forward_is_right():
    results = []
    for model in (adapted(Checkpointed(direct)), adapted(Checkpointed(use_reentrant=False))):
        w = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
        with moe_lora.route(model, w.softmax(-1)):
            model(torch.linspace(-1, 1, 8).view(2, 4)).square().mean().backward()
        results.append({**gradients(model), "w": w.grad})
    assert_same_gradients(results[1], results[0])


def test_a_reentrant_checkpoint_is_an_error_where_weights_require_gradients():
    model = adapted(Checkpointed(use_reentrant=True))
    x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
    w = torch.rand(2, 3, requires_grad=True)
    with (
        moe_lora.route(model, w.softmax(-1)),
        pytest.raises(RuntimeError, match="use_reentrant=False"),
    ):
        model(x).square().mean().backward()


@pytest.mark.parametrize("weights", [None, torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0]])])
def test_a_reentrant_checkpoint_is_right_where_they_require_none(weights):
    results = []
    for model in (adapted(Checkpointed(use_reentrant=True)), adapted(Checkpointed(direct))):
        x = torch.linspace(-1, 1, 8).view(2, 4).requires_grad_()
        with nullcontext() if weights is None else moe_lora.route(model, weights):
            out = model(x)
        out.square().mean().backward()
        results.append({**gradients(model), "x": x.grad})
    assert_same_gradients(results[0], results[1])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_second_order_gradients_are_those_without_checkpointing(given, masked):
    results = []
    for model in (adapted(Checkpointed(direct)), adapted(Checkpointed(use_reentrant=False))):
        w = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]], requires_grad=True)
        learned = [p for p in model.parameters() if p.requires_grad] + [w] * given
        expert_grad_mask = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
        with (
            moe_lora.route(model, w.softmax(-1)) if given else nullcontext(),
            moe_lora.routing.teach_experts(model, expert_grad_mask) if masked else nullcontext(),
        ):
            out = model(torch.linspace(-1, 1, 8).view(2, 4))
        first = torch.autograd.grad(out.square().sum(), learned, create_graph=True)
        penalty = sum(grad.square().sum() for grad in first)
        second = torch.autograd.grad(penalty, learned)
        results.append(dict(enumerate((*first, *second))))
    assert_same_gradients(results[1], results[0])
