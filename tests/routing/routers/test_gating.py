from __future__ import annotations

import math

import pytest
import torch

from moe_lora.routing.routers.gating import HINT_BIAS, apply_task_hint, check_gate, gate, task_hints

NAMES = ("removal_expert", "background_expert", "completion_expert")
LOGITS = {
    "mixed": torch.tensor([[2.0, -1.0, 0.5, 0.1], [-3.0, -2.0, -9.0, -4.0]]),
    "ties": torch.zeros(3, 4),
    "partial tie": torch.tensor([[1.0, 1.0, 1.0, -5.0]]),
    "tokens": torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)),
    "huge": torch.tensor([[-1e4, 1e4, -1e30, 0.0]]),
}


@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS.keys())
@pytest.mark.parametrize(
    ("strategy", "top_k"), [("soft", None), ("hard", None), ("topk", 1), ("topk", 2), ("topk", 4)]
)
def test_rows_sum_to_one_and_are_finite(logits, strategy, top_k):
    weights = gate(logits, strategy, top_k=top_k)
    assert weights.shape == logits.shape
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(logits.shape[:-1]))


def test_soft_is_the_softmax_of_the_formula():
    logits = [0.3, -1.2, 2.0]
    terms = [math.exp(value / 0.7) for value in logits]
    expected = torch.tensor([term / sum(terms) for term in terms])
    torch.testing.assert_close(gate(torch.tensor(logits), temperature=0.7), expected)


@pytest.mark.parametrize("name", ["mixed", "ties", "partial tie", "tokens"])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_topk_leaves_exactly_k_nonzero(name, top_k):
    weights = gate(LOGITS[name], "topk", top_k=top_k)
    assert ((weights != 0).sum(-1) == top_k).all()


def test_topk_keeps_the_largest_of_negative_logits():
    logits = torch.tensor([[-5.0, -1.0, -3.0]])
    weights = gate(logits, "topk", top_k=2)
    expected = math.exp(-1) / (math.exp(-1) + math.exp(-3))
    torch.testing.assert_close(weights, torch.tensor([[0.0, expected, 1 - expected]]))


def test_topk_gives_dropped_experts_no_gradient():
    logits = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    (gate(logits, "topk", top_k=2) * torch.tensor([3.0, 1.0, 7.0])).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2] == 0
    assert (logits.grad[0, :2] != 0).all()


def test_hard_is_one_hot_forward_and_soft_backward():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(4, 3, dtype=torch.float64)
    hard = gate(logits, "hard", temperature=0.5)
    expected = torch.nn.functional.one_hot(logits.argmax(-1), 3).double()
    assert torch.equal(hard.detach(), expected)
    (hard_grad,) = torch.autograd.grad((hard * values).sum(), logits)
    soft = gate(logits, "soft", temperature=0.5)
    (soft_grad,) = torch.autograd.grad((soft * values).sum(), logits)
    assert soft_grad.abs().min() > 0
    torch.testing.assert_close(hard_grad, soft_grad, rtol=0, atol=0)


def test_temperature_limits():
    logits = torch.tensor([[2.0, 1.0, -1.0]])
    hot = gate(logits, temperature=1e6)
    torch.testing.assert_close(hot, torch.full((1, 3), 1 / 3), atol=1e-5, rtol=0)
    assert torch.equal(gate(logits, temperature=1e-3), torch.tensor([[1.0, 0.0, 0.0]]))
    largest = [gate(logits, temperature=t).max().item() for t in (0.5, 1.0, 2.0)]
    assert largest == sorted(largest, reverse=True)


def test_arithmetic_is_float32_or_float64():
    assert gate(torch.zeros(1, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert gate(torch.zeros(1, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("top2", 1.0, None), r"Expected `routing_strategy` to be one of .* but got 'top2'"),
        (("soft", 0.0, None), "Expected `routing_temperature` to be > 0, but got 0.0"),
        (("soft", float("nan"), None), "Expected `routing_temperature` to be > 0"),
        (("topk", 1.0, None), "Expected `top_k` to be given"),
        (("soft", 1.0, 2), "Expected `top_k` only with"),
        (("topk", 1.0, 0), r"Expected `top_k` to be in \[1, num_experts=3\], but got 0"),
        (("topk", 1.0, 6), r"Expected `top_k` to be in \[1, num_experts=3\], but got 6"),
    ],
)
def test_settings_that_are_no_gate_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        check_gate(*settings, num_experts=3)


def test_hints_of_the_three_experts():
    assert task_hints(NAMES) == (
        "removal_focus",
        "removal_only",
        "background_focus",
        "background_only",
        "completion_focus",
        "completion_only",
    )


@pytest.mark.parametrize("index", [0, 1, 2])
def test_focus_multiplies_the_odds(index):
    logits = torch.tensor([[0.5, -0.2, 0.1]])
    hint = NAMES[index].removesuffix("_expert") + "_focus"
    before, after = gate(logits)[0, index], gate(apply_task_hint(logits, hint, NAMES))[0, index]
    torch.testing.assert_close(after / (1 - after), before / (1 - before) * math.exp(HINT_BIAS))


@pytest.mark.parametrize("strategy", ["soft", "hard", "topk"])
def test_only_leaves_one_expert(strategy):
    logits = torch.tensor([[5.0, -2.0, 1.0], [0.0, 0.0, 0.0]], requires_grad=True)
    hinted = apply_task_hint(logits, "background_only", NAMES)
    weights = gate(hinted, strategy, top_k=2 if strategy == "topk" else None)
    assert torch.equal(weights, torch.tensor([[0.0, 1.0, 0.0]] * 2))
    (weights * torch.randn(2, 3)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(4, 3), (4, 5, 3)])
def test_hints_of_samples_are_those_of_each_sample_alone(shape):
    logits = torch.randn(shape)
    hints = ["removal_only", None, "completion_focus", "background_only"]
    found = apply_task_hint(logits, hints, NAMES)
    for index, hint in enumerate(hints):
        alone = apply_task_hint(logits[index : index + 1], hint, NAMES)
        assert torch.equal(found[index], alone[0])
    assert found[0, ..., 1:].isneginf().all()
    assert torch.equal(found[1], logits[1])


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (["removal_only"], "one entry per sample, 2 in all, but got 1"),
        ([], "one entry per sample, but got none"),
        (["removal_only", "shadow_only"], "got 'shadow_only'"),
    ],
)
def test_hints_that_fit_no_sample_raise(hints, message):
    with pytest.raises(ValueError, match=message):
        apply_task_hint(torch.randn(2, 3), hints, NAMES)


def test_no_hint_changes_nothing_and_an_unknown_one_raises():
    logits = torch.randn(2, 3)
    assert apply_task_hint(logits, None, NAMES) is logits
    with pytest.raises(
        ValueError, match=r"Expected `task_hint` to be one of .* got 'shadow_focus'"
    ):
        apply_task_hint(logits, "shadow_focus", NAMES)
