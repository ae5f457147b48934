from __future__ import annotations

import math

import pytest

from moe_lora.schedules import Annealing, Phase

FULL = {"base": 1.0, "boundary": 0.3, "detail": 0.2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"steps": 0}, "`steps` to be >= 1"),
        ({"mode": "mixed"}, "`mode` to be one of"),
        ({"train": "base"}, "`train` to be one of"),
        ({"train": None}, "`train` to be one of"),
        ({"temperature": 0.0}, "`temperature` to be > 0"),
        ({"losses": {"lpips": 1.0}}, "components of .*but got 'lpips'"),
        ({"losses": {"base": -1.0}}, "finite and >= 0"),
        ({"losses": {"base": math.nan}}, "finite and >= 0"),
        ({"losses": {"base": 0.0}}, "at least one loss weight"),
        ({"losses": {}}, "at least one loss weight"),
        ({"losses": FULL, "warmup_steps": -1}, "`warmup_steps` to be in"),
        ({"losses": FULL, "warmup_steps": 6, "steps": 5}, r"in \[0, steps=5\], but got 6"),
        ({"warmup_steps": 3}, "`losses` to be given"),
    ],
)
def test_what_cannot_be_honored_raises(given, told):
    with pytest.raises(ValueError, match=told):
        Phase(**given)


def test_the_mode_follows_from_the_losses_unless_it_is_given():
    assert Phase(losses=FULL).routing_mode() == "routed"
    assert Phase(losses={"base": 1.0, "detail": 0.0}).routing_mode() == "uniform"
    assert Phase(losses={"base": 1.0}, mode="routed").routing_mode() == "routed"
    assert Phase(losses=FULL, mode="uniform").routing_mode() == "uniform"
    assert Phase().routing_mode() is None


def test_warm_up_raises_the_specialized_weights_and_leaves_the_base_alone():
    phase = Phase(losses=FULL, warmup_steps=4)
    found = [phase.losses_at(step, {"base": 0.5}) for step in (0, 1, 3, 4, 100)]
    for weights, share in zip(found, [0.25, 0.5, 1, 1, 1], strict=True):
        assert weights == pytest.approx(
            {"base": 1.0, "boundary": 0.3 * share, "detail": 0.2 * share}
        )


def test_warm_up_starts_where_the_phase_before_ended():
    phase = Phase(losses={"base": 1.0, "boundary": 0.4}, warmup_steps=2)
    before = {"base": 1.0, "boundary": 0.2, "detail": 0.6}
    assert phase.losses_at(0, before) == pytest.approx(
        {"base": 1.0, "boundary": 0.3, "detail": 0.3}
    )
    assert phase.losses_at(1, before) == {"base": 1.0, "boundary": 0.4}


def test_what_is_not_given_stays_as_before():
    assert Phase().losses_at(3, None) is None
    assert Phase().losses_at(3, FULL) == FULL
    assert Phase().temperature_at(3) is None


def test_a_temperature_is_a_number_or_an_annealing():
    assert Phase(temperature=0.7).temperature_at(9) == 0.7
    assert Phase(temperature=Annealing(2.0, 1.0, 4, "linear")).temperature_at(2) == 1.5
