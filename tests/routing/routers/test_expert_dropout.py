from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from tiny_models import OneLinear
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig, Router, RouterInputs
from moe_lora.routing.routers.expert_dropout import drop_experts


class Head(Router):
    """Choose by the mean of the tokens, or by every token."""

    def __init__(self, experts: int = 3, by_token: bool = False) -> None:
        super().__init__()
        self.head, self.by_token = nn.Linear(6, experts), by_token

    def logits(self, inputs: RouterInputs) -> Tensor:
        hidden = inputs.hidden_states
        return self.head(hidden if self.by_token else hidden.mean(1))


def adapted(p: float, *, by_token: bool = False, **config) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        OneLinear(),
        MoELoraConfig(
            r=2,
            target_modules=["linear"],
            expert_dropout=p,
            init_lora_weights=False,
            **config,
        ),
    )
    moe_lora.attach_router(model, Head(by_token=by_token))
    model.get_base_model().linear.register_forward_hook(note_weights)
    return model.train()


def note_weights(layer: nn.Module, *_: object) -> None:
    layer.used = layer.context.current().weights["default"]


def used(model: nn.Module) -> Tensor:
    """Return the weights that the layers got in the last call."""
    return model.get_base_model().linear.used


def probability_of(kept: tuple[bool, ...], p: float) -> float:
    """Return how often exactly these experts stay, where nothing is -inf."""
    stays = sum(kept)
    plain = (1 - p) ** stays * p ** (len(kept) - stays)
    return plain + (p ** len(kept) / len(kept) if stays == 1 else 0.0)


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_every_choice_of_experts_is_as_frequent_as_it_should_be(p):
    samples = 20_000
    kept = drop_experts(torch.zeros(samples, 3), p) == 0
    for choice in itertools.product([True, False], repeat=3):
        found = (kept == torch.tensor(choice)).all(-1).float().mean().item()
        expected = probability_of(choice, p) if any(choice) else 0.0
        assert found == pytest.approx(expected, abs=4 * (0.25 / samples) ** 0.5), choice


def test_all_tokens_of_a_sample_lose_the_same_experts():
    kept = drop_experts(torch.zeros(50, 7, 4), 0.5) == 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert len(kept[:, 0].unique(dim=0)) > 5


def test_an_expert_that_is_out_already_does_not_count_as_one_that_stays():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(200, 3)
    assert torch.equal(drop_experts(logits, 0.9), logits)
    tokens = torch.zeros(200, 2, 3)
    tokens[:, 0, :2] = -torch.inf
    dropped = drop_experts(tokens, 0.9)
    assert (dropped > -torch.inf).any(-1).all()


@pytest.mark.parametrize("p", [1.0, -0.1, float("nan")])
def test_a_probability_outside_its_range_raises(p):
    with pytest.raises(ValueError, match=r"Expected `expert_dropout` to be in \[0, 1\)"):
        drop_experts(torch.zeros(1, 3), p)
    with pytest.raises(ValueError, match=r"Expected `expert_dropout` to be a number in \[0, 1\)"):
        MoELoraConfig(expert_dropout=p)


@pytest.mark.parametrize("by_token", [False, True])
def test_the_layers_get_renormalized_weights_and_the_decision_keeps_all(by_token):
    model, x = adapted(0.5, by_token=by_token), torch.randn(40, 3, 6)
    model(x)
    decision, weights = moe_lora.current_routing(model), used(model)
    assert torch.equal(decision.weights, decision.logits.softmax(-1))
    kept = weights > 0
    assert 0.2 < 1 - kept.float().mean() < 0.6
    expected = decision.weights * kept
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))
    assert moe_lora.routing_stats(model).mean_weights == pytest.approx(
        decision.weights.flatten(0, -2).mean(0).tolist(), abs=1e-6
    )


def test_a_dropped_expert_adds_nothing():
    model, x = adapted(0.5), torch.randn(6, 3, 6)
    out, weights = model(x), used(model)
    experts = model.get_base_model().linear.moe_lora_experts["default"]
    slow = model.get_base_model().linear.base_layer(x)
    for b, e in itertools.product(range(6), range(3)):
        B, A = experts.lora_B[:, e], experts.lora_A[e]
        slow = slow.index_add(
            0, torch.tensor([b]), weights[b, e] * experts.scaling * (x[b] @ A.T @ B.T)[None]
        )
    torch.testing.assert_close(out, slow)


@pytest.mark.parametrize(("strategy", "top_k"), [("hard", None), ("topk", 2)])
def test_other_strategies_choose_among_those_that_stay(strategy, top_k):
    model, x = adapted(0.5, routing_strategy=strategy, top_k=top_k), torch.randn(60, 3, 6)
    model(x)
    decision, weights = moe_lora.current_routing(model), used(model)
    torch.testing.assert_close(weights.sum(-1), torch.ones(60))
    first = weights.argmax(-1) == decision.weights.argmax(-1)
    assert 0.3 < first.float().mean() < 0.8
    assert ((weights != 0).sum(-1) <= (top_k or 1)).all()


def test_gradient_reaches_the_router_through_the_weights_that_are_used():
    model = adapted(0.4)
    model(torch.randn(8, 3, 6)).square().mean().backward()
    router = next(m for m in model.modules() if isinstance(m, Router))
    assert router.head.weight.grad.abs().sum() > 0


def test_nothing_is_dropped_outside_of_training_nor_in_uniform_mode():
    model, x = adapted(0.9), torch.randn(8, 3, 6)
    model.eval()(x)
    assert used(model) is moe_lora.current_routing(model).weights
    model.train()
    moe_lora.set_routing_mode(model, "uniform")
    plain = adapted(0.0)
    moe_lora.set_routing_mode(plain, "uniform")
    assert torch.equal(model(x), plain(x))


def test_draws_are_those_of_the_seed():
    model, x = adapted(0.5), torch.randn(30, 3, 6)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model(x)
        found.append(used(model) > 0)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_only_hint_is_honored():
    model = adapted(0.9)
    moe_lora.set_router_inputs(model, task_hint="background_only")
    model(torch.randn(50, 3, 6))
    assert torch.equal(used(model), torch.tensor([0.0, 1.0, 0.0]).expand(50, 3))


def test_only_hints_of_samples_are_honored_when_guidance_repeats_them():
    model, x = adapted(0.9), torch.randn(25, 3, 6)
    hints = ["background_only", *["removal_only"] * 24]
    moe_lora.set_router_inputs(model, task_hint=hints)
    model(torch.cat([x, x]))
    assert used(model).argmax(-1).tolist() == 2 * [1, *[0] * 24]
    assert torch.equal(used(model).sum(-1), torch.ones(50))


def test_the_config_decides_and_is_saved(tmp_path):
    model = adapted(0.25)
    assert next(m for m in model.modules() if isinstance(m, Router)).expert_dropout == 0.25
    model.peft_config["default"].save_pretrained(tmp_path)
    assert MoELoraConfig.from_pretrained(tmp_path).expert_dropout == 0.25


def test_checkpointed_layers_are_recomputed_with_the_same_experts_dropped(monkeypatch):
    model, x = adapted(0.5), torch.randn(8, 3, 6, requires_grad=True)
    linear, checkpoint = model.get_base_model().linear, moe_lora.routing.routed_checkpoint(model)
    plain, grads = linear.forward, []

    def recomputed(x: Tensor) -> Tensor:
        return checkpoint(plain, x, use_reentrant=False)

    for forward in (plain, recomputed):
        monkeypatch.setattr(linear, "forward", forward)
        model.zero_grad()
        torch.manual_seed(3)
        (model(x) - model(2 * x)).square().mean().backward()
        grads.append(linear.moe_lora_experts["default"].lora_B.grad.clone())
    assert torch.equal(*grads)
