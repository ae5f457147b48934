from __future__ import annotations

import pytest
import torch

from moe_lora import RemovalLoss
from moe_lora.losses.expert_signals import ExpertSignals

pytestmark = pytest.mark.slow

B, MAX_SIGMA = 6, 0.7


def removal_loss(**kwargs):
    return RemovalLoss(decoder=lambda latents: latents[:, :3], max_sigma=MAX_SIGMA, **kwargs)


def batch():
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    mask = torch.zeros(B, 1, 8, 8)
    mask[:, :, 2:6, 1:5] = 1
    return {
        "velocity": uniform(B, 3, 8, 8),
        "target_velocity": uniform(B, 3, 8, 8),
        "x_t": uniform(B, 3, 8, 8),
        "sigma": torch.tensor([0.1, 0.2, 0.5, 0.6, 0.8, 0.9]),
        "mask": mask,
        "target": uniform(B, 3, 8, 8),
    }


def test_the_shares_of_a_batch_are_the_probabilities():
    signals = ExpertSignals(removal_loss(), base_share=0.4)
    sigma = torch.full((100,), 0.3)
    for seed in range(5):
        counts = signals.assign(sigma, torch.Generator().manual_seed(seed)).bincount(minlength=4)
        assert (counts - torch.tensor([40, 20, 20, 20])).abs().max() <= 1


def test_small_batches_draw_every_component_as_often_as_it_should_be():
    signals = ExpertSignals(removal_loss(), base_share=0.4)
    generator = torch.Generator().manual_seed(0)
    draws = torch.cat([signals.assign(torch.full((2,), 0.3), generator) for _ in range(3000)])
    shares = draws.bincount(minlength=4) / len(draws)
    torch.testing.assert_close(shares, torch.tensor([0.4, 0.2, 0.2, 0.2]), rtol=0, atol=0.02)


def test_samples_above_the_gate_get_the_base_loss():
    signals = ExpertSignals(removal_loss(), base_share=0.01)
    for seed in range(10):
        drawn = signals.assign(batch()["sigma"], torch.Generator().manual_seed(seed))
        assert drawn[4:].tolist() == [0, 0]
        assert (drawn[:4] != 0).sum() >= 3


def test_the_expected_total_and_gradient_are_those_of_the_removal_loss():
    loss = removal_loss()
    signals = ExpertSignals(loss, base_share=0.4)
    inputs = batch()
    inputs["velocity"].requires_grad_()
    expected = loss(**inputs).total
    (gradient,) = torch.autograd.grad(expected, inputs["velocity"])
    generator = torch.Generator().manual_seed(0)
    totals, gradients = [], []
    for _ in range(4000):
        total = signals(assignment=signals.assign(inputs["sigma"], generator), **inputs).total
        totals.append(total.detach())
        gradients.append(torch.autograd.grad(total, inputs["velocity"])[0])
    torch.testing.assert_close(torch.stack(totals).mean(), expected.detach(), rtol=0.01, atol=0)
    error = (torch.stack(gradients).mean(0) - gradient).norm() / gradient.norm()
    assert error < 0.05


def test_a_sample_feels_its_own_component_only():
    loss = removal_loss()
    signals = ExpertSignals(loss)
    inputs = batch()
    inputs["velocity"].requires_grad_()
    assignment = torch.tensor([0, 1, 2, 3, 0, 0])
    total, components = signals(assignment=assignment, **inputs)
    assert set(components) == set(signals.components)
    (found,) = torch.autograd.grad(total, inputs["velocity"])
    for index, name in ((1, "boundary"), (2, "consistency"), (3, "detail")):
        settings = dict.fromkeys(("base", "boundary", "consistency", "detail"), 0.0)
        alone = removal_loss(**{**settings, name: loss.weights[name]})
        one = {k: v[index : index + 1].detach() for k, v in inputs.items()}
        one["velocity"].requires_grad_()
        value = alone(**one)
        torch.testing.assert_close(components[name], value.components[name])
        (wanted,) = torch.autograd.grad(value.total, one["velocity"])
        # One of four samples below the gate, drawn with probability 1/6.
        torch.testing.assert_close(found[index : index + 1], wanted / 4 * 6)


def test_expert_grad_mask_follow_names_and_order():
    names = ("completion_expert", "removal_expert", "background_expert", "other")
    signals = ExpertSignals(removal_loss(), expert_names=names, experts={"detail": "other"})
    assert signals.expert_grad_mask(torch.arange(4)).tolist() == [
        [1, 1, 1, 1],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_a_loss_that_is_switched_off_later_counts_nothing():
    loss = removal_loss()
    signals = ExpertSignals(loss)
    del loss.weights["detail"]
    total, components = signals(assignment=torch.tensor([3, 3, 3, 3, 0, 0]), **batch())
    assert set(components) == {"base"}
    assert total > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExpertSignals(removal_loss(base=0)), "the base loss and at least one specialized"),
        (
            lambda: ExpertSignals(removal_loss(boundary=0, consistency=0, detail=0)),
            "the base loss and at least one specialized",
        ),
        (lambda: ExpertSignals(removal_loss(), base_share=1.0), r"in \(0, 1\), but got 1.0"),
        (lambda: ExpertSignals(removal_loss(specialized_every=2)), "specialized_every=2"),
        (
            lambda: ExpertSignals(removal_loss(), expert_names=("a", "b")),
            "'boundary' to be one of",
        ),
        (
            lambda: ExpertSignals(removal_loss())(assignment=torch.zeros(2), **batch()),
            r"shape \(6,\), but got \(2,\)",
        ),
    ],
)
def test_what_cannot_be_paired_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()
