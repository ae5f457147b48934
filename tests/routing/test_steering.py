"""Effect and scope of the contexts around a pass."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.ablation import ablate_expert

X = torch.linspace(-1, 1, 48).view(2, 4, 6)
W = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.5, 0.3]])


class Mean(moe_lora.Router):
    def __init__(self, num_experts: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(6, num_experts)

    def logits(self, inputs):
        return self.head(inputs.hidden_states.mean(1))


def adapted(make_mlp, **config):
    torch.manual_seed(0)
    config = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False, **config}
    model = get_peft_model(make_mlp(), MoELoraConfig(**config))
    moe_lora.attach_router(model, Mean())
    return model


@pytest.fixture
def model(make_mlp):
    return adapted(make_mlp)


def learned(model):
    return [p for p in model.parameters() if p.requires_grad]


class TestOtherNumbersOfExperts:
    @pytest.fixture
    def two(self, model):
        config = MoELoraConfig(r=2, target_modules=["first"], num_experts=2)
        model.add_adapter("two", config)
        return model

    def test_an_inactive_adapter_does_not_count(self, two):
        expected = two(X)
        with moe_lora.route(two, W), moe_lora.routing.teach_experts(two, torch.ones(2, 3)):
            assert not torch.allclose(two(X), expected)
        two.set_adapter("two")
        with moe_lora.route(two, W[:, :2]), moe_lora.routing.teach_experts(two, torch.ones(2, 2)):
            two(X)

    @pytest.mark.parametrize("experts", [2, 3])
    def test_two_active_adapters_need_weights_for_both(self, two, experts):
        two.base_model.set_adapter(["default", "two"])
        with pytest.raises(ValueError, match=r"E in \[2, 3\]"), moe_lora.route(two, W[:, :experts]):
            pass

    def test_switching_inside_the_context_is_an_error_of_the_pass(self, two):
        with moe_lora.route(two, W):
            two.set_adapter("two")
            with pytest.raises(ValueError, match=r"E in \[2\]"):
                two(X)


class TestWeightsOfOneRow:
    def test_they_serve_a_batch_and_get_the_gradient_of_all_samples(self, model):
        one = W[:1].clone().requires_grad_()
        with moe_lora.route(model, one):
            found = model(X)
        with moe_lora.route(model, one.expand(2, 3)):
            expected = model(X)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        assert one.grad.abs().min() > 0

    def test_by_token_too(self, model):
        tokens = torch.rand(1, 4, 3)
        with moe_lora.route(model, tokens):
            found = model(X)
        with moe_lora.route(model, tokens.expand(2, 4, 3)):
            torch.testing.assert_close(model(X), found)


class TestTopK:
    def test_weights_that_are_changed_in_place_choose_anew(self, model):
        weights = torch.tensor([[0.7, 0.0, 0.3], [0.7, 0.0, 0.3]])
        with moe_lora.route(model, weights, top_k=2):
            model(X)
            weights.copy_(torch.tensor([[0.0, 0.9, 0.1], [0.5, 0.5, 0.0]]))
            found = model(X)
            block = model.base_model.model.first(X)
        with moe_lora.route(model, weights.clone()):
            torch.testing.assert_close(model(X), found)
            torch.testing.assert_close(model.base_model.model.first(X), block)

    def test_negative_weights_count(self, model):
        weights = torch.tensor([[0.0, -0.5, 1.5], [1.2, 0.0, -0.2]])
        with moe_lora.route(model, weights):
            expected = model(X)
        with moe_lora.route(model, weights, top_k=2):
            torch.testing.assert_close(model(X), expected)

    @pytest.mark.parametrize("top_k", [None, 1, 2, 3])
    def test_an_empty_batch_has_an_empty_output(self, model, top_k):
        with moe_lora.route(model, torch.zeros(0, 3), top_k=top_k):
            assert model(X[:0]).shape[0] == 0

    @pytest.mark.parametrize("top_k", [0, 4, 1.5, True, "2"])
    def test_an_invalid_top_k_raises(self, model, top_k):
        with pytest.raises(ValueError, match="`top_k`"), moe_lora.route(model, W, top_k=top_k):
            pass


def test_contexts_combine_whatever_their_order(model):
    gradients = []
    contexts = [
        lambda: moe_lora.route(model, W),
        lambda: ablate_expert(model, "removal_expert"),
        lambda: moe_lora.routing.teach_experts(model, torch.tensor([[1.0, 0, 0], [0, 1, 0]])),
    ]
    for order in itertools.permutations(contexts):
        with order[0](), order[1](), order[2]():
            out = model(X)
        gradients.append([out, *torch.autograd.grad(out.square().sum(), learned(model)[:2])])
    with moe_lora.route(model, W * torch.tensor([0.0, 1.0, 1.0])):
        expected = model(X)
    for found in gradients:
        torch.testing.assert_close(found[0], expected)
        for one, other in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(one, other)


def test_a_copy_made_inside_a_context_is_free_of_it(model):
    with moe_lora.route(model, W):
        copied = copy.deepcopy(model)
        expected = model(X)
        assert not torch.allclose(copied(X), expected)
    torch.testing.assert_close(copied(X), model(X))


def test_a_training_pass_walks_over_no_modules(model, monkeypatch):
    walked = []
    original = nn.Module.named_modules

    def note(self, *args, **kwargs):
        yield from original(self, *args, **kwargs)
        walked.append(type(self).__name__)  # to the end

    model(X)
    monkeypatch.setattr(nn.Module, "named_modules", note)
    model(X).sum().backward()
    assert not set(walked) & {"PeftModel", "MoELoraModel", type(model.get_base_model()).__name__}


class Rewarded(torch.autograd.Function):
    """Call a model in the backward pass, and differentiate it there."""

    @staticmethod
    def forward(ctx, x, model):
        ctx.model = model
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.model(x).square().sum()
            (found,) = torch.autograd.grad(out, x)
        return grad + found, None


@pytest.mark.parametrize("routed", [True, False])
def test_a_model_that_is_called_inside_a_backward_pass_routes_as_elsewhere(model, routed):
    if not routed:
        moe_lora.set_routing_mode(model, "uniform")
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    found = X.clone().requires_grad_()
    Rewarded.apply(found, model).sum().backward()
    torch.testing.assert_close(found.grad, expected + 1)
    # And inside the backward pass of the model itself.
    found = X.clone().requires_grad_()
    (model(Rewarded.apply(found, model)).square().sum()).backward()
    torch.testing.assert_close(found.grad, 2 * expected)


class TestACheckpointAroundTheWholeCall:
    def test_it_has_the_gradients_and_statistics_of_one_pass(self, model):
        found = []
        for call in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            model.zero_grad()
            moe_lora.routing_stats(model).reset()
            call(X).square().mean().backward()
            found.append([p.grad.clone() for p in learned(model)])
            assert sum(moe_lora.routing_stats(model).usage) == 2
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)

    def test_under_other_routing_it_is_an_error(self, model):
        with moe_lora.route(model, W):
            loss = checkpoint(model, X, use_reentrant=False).square().mean()
        with pytest.raises(RuntimeError, match="with other routing"):
            loss.backward()
