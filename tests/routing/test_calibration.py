from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from moe_lora.routing import fit_temperature, gate, router_supervision_loss


def drawn(temperature: float, shape=(4000, 4)):
    """Return logits whose probabilities are right at a temperature, with labels drawn from them."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape, generator=generator)
    probabilities = (logits / temperature).softmax(-1)
    return logits, torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_of_the_labels_is_found(temperature):
    logits, labels = drawn(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.07)


def test_two_experts_have_a_closed_form():
    logits = torch.tensor([[-1.5, 1.5]]).expand(10, 2)
    labels = torch.tensor([1] * 9 + [0])
    assert fit_temperature(logits, labels) == pytest.approx(3 / math.log(9), rel=1e-6)


def test_no_temperature_has_a_smaller_loss():
    logits, labels = drawn(2.0, (50, 3))
    found = fit_temperature(logits, labels)

    at_found = {
        factor: float(F.cross_entropy(logits / (found * factor), labels))
        for factor in (0.5, 0.98, 1, 1.02, 2)
    }
    assert min(at_found, key=at_found.get) == 1


def test_weights_equal_the_accuracy_of_an_overconfident_router():
    logits = 8 * F.one_hot(torch.arange(300) % 3, 3).float()
    labels = torch.where(
        torch.arange(300) < 200, torch.arange(300) % 3, (torch.arange(300) + 1) % 3
    )
    assert gate(logits)[0, 0] > 0.99
    weights = gate(logits, temperature=fit_temperature(logits, labels))
    assert weights[0, 0] == pytest.approx(2 / 3, abs=1e-4)


def test_the_range_limits_logits_that_are_always_or_never_right():
    logits = torch.tensor([[1.0, 0.0]])
    assert fit_temperature(logits, torch.tensor([0])) == pytest.approx(0.05)
    assert fit_temperature(logits, torch.tensor([0]), lowest=0.2) == pytest.approx(0.2)
    assert fit_temperature(logits, torch.tensor([1]), highest=9.0) == pytest.approx(9.0)


def test_rows_of_a_sample_share_its_label_and_unknown_samples_do_not_count():
    logits, labels = drawn(2.0, (60, 3))
    expected = fit_temperature(logits, labels)
    by_layer = torch.cat([logits, 99 * torch.ones(1, 3)]).unsqueeze(1).repeat(1, 2, 1)
    known = torch.cat([labels, torch.tensor([-1])])
    assert fit_temperature(by_layer, known) == pytest.approx(expected, rel=1e-6)
    assert not logits.requires_grad
    assert float(router_supervision_loss(by_layer, known)) == pytest.approx(
        float(F.cross_entropy(logits, labels)), rel=1e-5
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.tensor([-1, -1])), "at least one label"),
        ((torch.zeros(2, 3), torch.tensor([0])), "one per sample"),
        ((torch.zeros(2, 3), torch.tensor([0, 3])), "below the number of experts"),
        ((torch.full((1, 3), torch.nan), torch.tensor([0])), "finite `logits`"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(*arguments)


@pytest.mark.parametrize("limits", [(0.0, 1.0), (2.0, 1.0), (1.0, torch.inf)])
def test_an_invalid_range_raises(limits):
    with pytest.raises(ValueError, match="lowest < highest"):
        fit_temperature(torch.zeros(1, 2), torch.tensor([0]), lowest=limits[0], highest=limits[1])
