from __future__ import annotations

import math

import pytest
import torch

from moe_lora.routing.auxiliary_losses import (
    entropy_floor_loss,
    load_balancing_loss,
    router_supervision_loss,
    router_z_loss,
)
from moe_lora.routing.routers.gating import gate

SHAPES = [(6, 3), (1, 4), (2, 5, 3)]


def slow_load_balancing(weights: torch.Tensor) -> float:
    rows = weights.reshape(-1, weights.shape[-1]).tolist()
    experts = len(rows[0])
    total = 0.0
    for e in range(experts):
        chosen = sum(1 for row in rows if row.index(max(row)) == e) / len(rows)
        total += chosen * sum(row[e] for row in rows) / len(rows)
    return experts * total


@pytest.mark.parametrize("shape", SHAPES)
def test_load_balancing_equals_the_loop(shape):
    torch.manual_seed(1)
    weights = torch.randn(shape, dtype=torch.float64).softmax(-1)
    expected = slow_load_balancing(weights)
    assert load_balancing_loss(weights).item() == pytest.approx(expected, rel=1e-12)


def test_load_balancing_is_one_when_balanced_and_e_when_collapsed():
    assert load_balancing_loss(torch.eye(4)).item() == pytest.approx(1.0)
    assert load_balancing_loss(torch.full((8, 4), 0.25)).item() == pytest.approx(1.0)
    collapsed = torch.zeros(5, 4)
    collapsed[:, 2] = 1
    assert load_balancing_loss(collapsed).item() == pytest.approx(4.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_load_balancing_gradient_is_the_share_of_choices(shape):
    torch.manual_seed(2)
    weights = torch.randn(shape).softmax(-1).requires_grad_()
    load_balancing_loss(weights).backward()
    rows = weights.detach().reshape(-1, shape[-1])
    share = torch.bincount(rows.argmax(-1), minlength=shape[-1]) / len(rows)
    expected = (shape[-1] * share / len(rows)).expand_as(rows).reshape(shape)
    torch.testing.assert_close(weights.grad, expected)


def test_descending_the_load_balancing_loss_spreads_the_weights():
    logits = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.5]], requires_grad=True)
    before = load_balancing_loss(logits.softmax(-1))
    before.backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert load_balancing_loss((logits - logits.grad).softmax(-1)) < before


@pytest.mark.parametrize("shape", SHAPES)
def test_z_loss_equals_the_loop(shape):
    torch.manual_seed(3)
    logits = 4 * torch.randn(shape, dtype=torch.float64)
    rows = logits.reshape(-1, shape[-1]).tolist()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)
    assert router_z_loss(logits).item() == pytest.approx(expected, rel=1e-12)


def test_z_loss_gradcheck():
    torch.manual_seed(4)
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(router_z_loss, (logits,))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [0.2, 0.95])
def test_entropy_floor_equals_the_loop(shape, floor):
    torch.manual_seed(5)
    weights = (3 * torch.randn(shape, dtype=torch.float64)).softmax(-1)
    rows = weights.reshape(-1, shape[-1]).tolist()
    entropies = [-sum(w * math.log(w) for w in row) / math.log(shape[-1]) for row in rows]
    expected = max(0.0, floor - sum(entropies) / len(rows))
    assert entropy_floor_loss(weights, floor).item() == pytest.approx(expected, rel=1e-12)


def test_entropy_floor_is_the_floor_when_collapsed_and_silent_above_it():
    logits = torch.zeros(3, 4, requires_grad=True)
    loss = entropy_floor_loss(logits.softmax(-1), 0.5)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 4))
    assert entropy_floor_loss(torch.eye(4), 0.3).item() == pytest.approx(0.3)


def test_entropy_floor_gradcheck():
    torch.manual_seed(6)
    logits = (3 * torch.randn(2, 3, 4, dtype=torch.float64)).requires_grad_()
    loss = entropy_floor_loss(logits.softmax(-1), 0.9)
    assert loss > 0
    assert torch.autograd.gradcheck(
        lambda given: entropy_floor_loss(given.softmax(-1), 0.9), (logits,)
    )


def test_entropy_floor_has_a_finite_gradient_where_experts_are_left_out():
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    weights = gate(logits, "topk", top_k=2)
    assert weights[0, 2] == 0
    entropy_floor_loss(weights, 0.6).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0] > 0 > logits.grad[0, 1]
    assert logits.grad[0, 2] == 0


@pytest.mark.parametrize("floor", [0.0, 1.0, -0.1, math.nan])
def test_a_floor_outside_its_range_raises(floor):
    with pytest.raises(ValueError, match=r"Expected `floor` to be in \(0, 1\)"):
        entropy_floor_loss(torch.eye(3), floor)


def test_the_entropy_of_one_expert_raises():
    with pytest.raises(ValueError, match="at least 2 experts, but got 1"):
        entropy_floor_loss(torch.ones(4, 1))


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss, entropy_floor_loss])
@pytest.mark.parametrize("shape", [(3,), (1, 2, 3, 4)])
def test_other_shapes_raise(loss, shape):
    with pytest.raises(ValueError, match=r"to have shape \(B, E\) or \(B, T, E\), but got"):
        loss(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3)])
def test_supervision_is_the_cross_entropy_of_labeled_samples(shape):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, -1, 0, 1, -1])
    loss = router_supervision_loss(logits, labels, label_smoothing=0.1)
    logs = logits.detach().log_softmax(-1).reshape(5, -1, 3)
    expected = [
        -(0.9 * logs[i, :, label] + 0.1 * logs[i].mean(-1)).mean()
        for i, label in enumerate(labels.tolist())
        if label >= 0
    ]
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean())
    loss.backward()
    assert not logits.grad[1].any()
    assert logits.grad[0].any()


def test_supervision_without_labels_is_zero_with_a_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    loss = router_supervision_loss(logits, torch.tensor([-1, -1]))
    loss.backward()
    assert loss == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("labels", "kwargs", "message"),
    [
        (torch.tensor([0, 3]), {}, "number of experts"),
        (torch.tensor([0]), {}, "2 integers"),
        (torch.tensor([0.0, 1.0]), {}, "2 integers"),
        (torch.tensor([0, 1]), {"label_smoothing": 1.0}, "`label_smoothing`"),
    ],
)
def test_labels_are_checked(labels, kwargs, message):
    with pytest.raises(ValueError, match=message):
        router_supervision_loss(torch.zeros(2, 3), labels, **kwargs)
