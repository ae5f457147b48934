from __future__ import annotations

import math

import pytest
import torch

from moe_lora.metrics import MetricValues, join


def found() -> MetricValues:
    return MetricValues(
        torch.tensor([20.0, 0.0, 30.0, 40.0], dtype=torch.float64), torch.tensor([64, 0, 8, 16])
    )


def test_missing_samples_count_for_nothing() -> None:
    assert found().tolist() == [20.0, None, 30.0, 40.0]
    assert found().mean() == 30.0


def test_small_regions_can_be_left_out() -> None:
    assert found().tolist(least=16) == [20.0, None, None, 40.0]
    assert found().mean(least=16) == 30.0
    assert found().mean(least=17) == 20.0
    assert found().present(8).tolist() == [True, False, True, True]


def test_where_all_are_missing_there_is_no_mean() -> None:
    nothing = MetricValues(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert nothing.mean() is None
    assert nothing.tolist() == [None, None]


def test_groups_are_means_of_their_own() -> None:
    labels = ["box", "box", "stroke", "box"]
    assert found().mean_by(labels) == {"box": 30.0, "stroke": 30.0}
    assert found().mean_by(labels, least=16) == {"box": 30.0, "stroke": None}
    assert list(found().mean_by(["d", "c", "b", "a"])) == ["d", "c", "b", "a"]


def test_groups_need_a_label_each() -> None:
    with pytest.raises(ValueError, match="each of 4 samples, but got 1"):
        found().mean_by(["box"])


def test_batches_are_joined_in_order() -> None:
    other = MetricValues(torch.tensor([7.0], dtype=torch.float64), torch.tensor([3]))
    joined = join([{"a": found()}, {"a": other}])["a"]
    assert joined.tolist() == [20.0, None, 30.0, 40.0, 7.0]
    assert joined.pixels.tolist() == [64, 0, 8, 16, 3]
    assert math.isclose(joined.mean() or 0, 24.25)


def test_batches_must_agree() -> None:
    with pytest.raises(ValueError, match="at least one"):
        join([])
    with pytest.raises(ValueError, match="'b'"):
        join([{"a": found()}, {"a": found(), "b": found()}])
