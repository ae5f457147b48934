"""The presets: mode, loss weights, temperature and trained parts, step by step."""

from __future__ import annotations

import pytest

from moe_lora import RemovalLoss
from moe_lora.schedules import PRESETS, Setting, preset

ALL = {"base": 1.0, "boundary": 0.3, "consistency": 0.5, "detail": 0.2}
STEPS = (0, 1, 499, 500, 999, 1000, 1001, 50_000)


def test_there_are_six():
    assert list(PRESETS) == ["A", "B", "C", "1", "2", "3"]


@pytest.mark.parametrize("name", ["A", "2"])
def test_differentiation_is_routed_with_all_losses_from_the_start(name):
    expected = Setting(0, "routed", None, ALL, "all")
    assert [preset(name).at(step) for step in STEPS] == [expected] * len(STEPS)


@pytest.mark.parametrize("name", ["B", "3"])
def test_the_baseline_is_uniform_with_the_base_loss_throughout(name):
    expected = Setting(0, "uniform", None, {"base": 1.0}, "all")
    assert [preset(name).at(step) for step in STEPS] == [expected] * len(STEPS)


def test_custom_specialization_focuses_on_edges_unless_told_otherwise():
    expected = Setting(0, "routed", None, {"base": 1.0, "boundary": 0.8}, "all")
    assert [preset("C").at(step) for step in STEPS] == [expected] * len(STEPS)
    mine = {"base": 1.0, "consistency": 0.8, "boundary": 0.3}
    assert preset("C", losses=mine).at(7).loss_weights == mine


def test_progressive_lays_a_foundation_first():
    foundation = Setting(0, "uniform", None, {"base": 1.0}, "all")
    specialized = Setting(1, "routed", None, ALL, "all")
    found = [preset("1").at(step) for step in STEPS]
    assert found == [foundation] * 5 + [specialized] * 3
    found = [preset("1", foundation_steps=500).at(step) for step in STEPS]
    assert found == [foundation] * 3 + [specialized] * 5


def test_progressive_keeps_the_weight_of_the_base_loss():
    mine = {"base": 2.0, "detail": 0.5}
    schedule = preset("1", losses=mine, foundation_steps=1)
    assert schedule.at(0).loss_weights == {"base": 2.0}
    assert schedule.at(1).loss_weights == mine


def test_the_weights_are_the_defaults_of_the_loss():
    assert preset("A").at(0).loss_weights == ALL == RemovalLoss().weights


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("4", {}, "`name` to be one of"),
        ("a", {}, "`name` to be one of"),
        (
            "A",
            {"foundation_steps": 5},
            "`foundation_steps` to be None for preset 'A', which has one phase, but got 5",
        ),
        ("1", {"foundation_steps": 0}, "`steps` to be >= 1"),
        ("B", {"losses": ALL}, "`losses` to be None for preset 'B'"),
        ("C", {"losses": {"base": 1.0}}, "`losses` to include one of"),
        ("C", {"losses": {"sharpness": 1.0, "detail": 1.0}}, "'sharpness'"),
    ],
)
def test_what_cannot_be_honored_raises(name, given, told):
    with pytest.raises(ValueError, match=told):
        preset(name, **given)
