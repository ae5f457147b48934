from __future__ import annotations

import itertools
import math

import pytest

from moe_lora.schedules import Annealing

CURVES = ["linear", "cosine", "exponential"]


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(("start", "end"), [(2.0, 0.5), (0.5, 3.0)])
def test_it_goes_from_start_to_end_and_stays(curve, start, end):
    annealing = Annealing(start, end, 40, curve)
    values = [annealing(step) for step in range(60)]
    assert values[0] == pytest.approx(start)
    assert values[40:] == [end] * 20
    steps = [(b - a) * (end - start) for a, b in itertools.pairwise(values)]
    assert all(step > 0 for step in steps[:40])


def test_the_curves_are_those_of_their_formulas():
    for step in range(10):
        t = step / 10
        assert Annealing(3.0, 1.0, 10, "linear")(step) == pytest.approx(3 - 2 * t)
        cosine = 1 + 2 * math.cos(math.pi * t / 2) ** 2
        assert Annealing(3.0, 1.0, 10, "cosine")(step) == pytest.approx(cosine)
        exponential = math.exp(math.log(3.0) * (1 - t))
        assert Annealing(3.0, 1.0, 10, "exponential")(step) == pytest.approx(exponential)


def test_cosine_is_the_default_and_half_way_in_the_middle():
    assert Annealing(2.0, 1.0, 10)(5) == pytest.approx(1.5)
    assert Annealing(2.0, 1.0, 10)(1) > 2.0 - 0.1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((0.0, 1.0, 5), "`start` to be finite and > 0"),
        ((1.0, -1.0, 5), "`end` to be finite and > 0"),
        ((1.0, math.inf, 5), "`end` to be finite"),
        ((1.0, 2.0, 0), "`steps` to be >= 1"),
        ((1.0, 2.0, 5, "sine"), "`curve` to be one of"),
    ],
)
def test_what_cannot_be_honored_raises(given, told):
    with pytest.raises(ValueError, match=told):
        Annealing(*given)
