from __future__ import annotations

import copy
import math
import pickle
import threading

import pytest
import torch

from moe_lora.routing.statistics import RoutingStats

NAMES = ("removal_expert", "background_expert", "completion_expert")


def test_counts_means_and_entropy_equal_the_loop():
    torch.manual_seed(0)
    batches = [torch.randn(b, 3).softmax(-1) for b in (1, 4, 3)]
    stats = RoutingStats(NAMES)
    for batch in batches:
        stats.update(batch)
    rows = [row for batch in batches for row in batch.tolist()]
    counts = [sum(row.index(max(row)) == e for row in rows) for e in range(3)]
    means = [sum(row[e] for row in rows) / len(rows) for e in range(3)]
    entropies = [-sum(w * math.log(w) for w in row) / math.log(3) for row in rows]
    assert stats.usage == counts
    assert stats.mean_weights == pytest.approx(means, rel=1e-5)
    assert stats.entropy == pytest.approx(sum(entropies) / len(rows), rel=1e-5)
    assert stats.current_weights == pytest.approx(batches[-1].mean(0).tolist(), rel=1e-6)


def test_as_dict_has_the_documented_keys():
    stats = RoutingStats(NAMES)
    stats.update(torch.tensor([[0.25, 0.55, 0.20], [0.75, 0.05, 0.20]]))
    values = stats.as_dict()
    assert list(values) == ["expert_0_usage", "expert_1_usage", "expert_2_usage", "current_weights"]
    assert [values[f"expert_{i}_usage"] for i in range(3)] == [1, 1, 0]
    assert all(type(values[f"expert_{i}_usage"]) is int for i in range(3))
    assert values["current_weights"] == pytest.approx([0.5, 0.3, 0.2])


def test_log_line_shows_the_running_mean():
    stats = RoutingStats(NAMES)
    stats.update(torch.tensor([[0.5, 0.3, 0.2]]))
    stats.update(torch.tensor([[0.4, 0.4, 0.2]]))
    assert stats.log_line() == "Expert Usage: removal=0.45, background=0.35, completion=0.20"


def test_token_weights_count_as_sample_means():
    torch.manual_seed(1)
    weights = torch.randn(3, 7, 3).softmax(-1)
    by_token, by_sample = RoutingStats(NAMES), RoutingStats(NAMES)
    by_token.update(weights)
    by_sample.update(weights.mean(1))
    assert by_token.as_dict() == by_sample.as_dict()
    assert by_token.entropy == by_sample.entropy
    assert sum(by_token.usage) == 3


def test_entropy_limits():
    stats = RoutingStats(NAMES)
    stats.update(torch.eye(3))
    assert stats.entropy == 0.0
    stats.reset()
    stats.update(torch.full((2, 3), 1 / 3))
    assert stats.entropy == pytest.approx(1.0)
    single = RoutingStats(["only"])
    single.update(torch.ones(2, 1))
    assert single.entropy == 0.0


def test_nothing_seen_is_nan_and_not_uniform():
    stats = RoutingStats(NAMES)
    assert stats.usage == [0, 0, 0]
    assert all(math.isnan(weight) for weight in stats.mean_weights + stats.current_weights)
    assert math.isnan(stats.entropy)
    assert stats.log_line() == "Expert Usage: removal=nan, background=nan, completion=nan"
    assert not stats.is_collapsed()
    stats.update(torch.zeros(0, 3))
    assert stats.usage == [0, 0, 0]


def test_reset_forgets():
    stats = RoutingStats(NAMES)
    stats.update(torch.eye(3))
    stats.reset()
    stats.update(torch.tensor([[0.0, 1.0, 0.0]]))
    assert stats.usage == [0, 1, 0]
    assert stats.mean_weights == [0.0, 1.0, 0.0]


def test_collapse_is_reported_once_until_reset():
    stats = RoutingStats(NAMES)
    stats.update(torch.eye(3))
    assert not stats.is_collapsed()
    assert stats.collapse_warning() is None
    stats.reset()
    for _ in range(2):
        stats.update(torch.tensor([[0.02, 0.95, 0.03]]))
        assert stats.is_collapsed()
    assert not stats.is_collapsed(threshold=0.96)
    warning = stats.collapse_warning()
    assert warning is not None
    assert "background_expert has 95% of the weight over the last 2 samples" in warning
    assert stats.collapse_warning() is None
    stats.reset()
    stats.update(torch.tensor([[0.02, 0.95, 0.03]]))
    assert stats.collapse_warning() is not None


def test_idle_experts_are_named_by_their_running_mean():
    stats = RoutingStats(NAMES)
    assert stats.idle_experts() == ()
    stats.update(torch.tensor([[0.6, 0.395, 0.005], [0.6, 0.395, 0.005]]))
    assert stats.idle_experts() == ("completion_expert",)
    assert stats.idle_experts(threshold=0.5) == NAMES[1:]
    assert not stats.is_collapsed()
    stats.update(torch.tensor([[0.0, 0.0, 1.0], [0.99, 0.01, 0.0]]))
    assert stats.idle_experts() == ()


def test_the_warning_names_what_helps():
    stats = RoutingStats(NAMES)
    stats.update(torch.tensor([[0.95, 0.03, 0.02]]))
    warning = stats.collapse_warning()
    for remedy in ("load-balancing", "entropy floor", "temperature", "expert dropout", "uniform"):
        assert remedy in warning


def test_balanced_hard_routing_is_no_collapse():
    stats = RoutingStats(NAMES)
    for index in range(3):
        stats.update(torch.eye(3)[[index]])
    assert stats.mean_weights == pytest.approx([1 / 3] * 3)
    assert not stats.is_collapsed()


def test_the_graph_is_not_kept():
    weights = torch.randn(2, 3, requires_grad=True).softmax(-1)
    stats = RoutingStats(NAMES)
    stats.update(weights)
    held = [value for value in vars(stats).values() if isinstance(value, torch.Tensor)]
    assert held
    assert not any(value.requires_grad for value in held)


def test_update_does_not_read_values():
    # A meta tensor has none: any wait for the device would raise.
    RoutingStats(NAMES).update(torch.empty(2, 4, 3, device="meta"))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_count_for_themselves(clone):
    stats = RoutingStats(NAMES)
    stats.update(torch.eye(3))
    twin = clone(stats)
    assert twin.as_dict() == stats.as_dict()
    twin.update(torch.eye(3))
    assert (stats.usage, twin.usage) == ([1, 1, 1], [2, 2, 2])


def test_bfloat16_weights_are_averaged_in_float32():
    stats = RoutingStats(NAMES)
    for _ in range(300):
        stats.update(torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.bfloat16))
    assert stats.mean_weights == pytest.approx([0.5, 0.25, 0.25], rel=1e-6)
    assert stats.usage == [300, 0, 0]


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 4, 2), (1, 2, 2, 3)])
def test_other_shapes_raise(shape):
    with pytest.raises(ValueError, match=r"Expected `weights` to have shape \(B, 3\)"):
        RoutingStats(NAMES).update(torch.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [None, 4])
@pytest.mark.parametrize("first", [False, True])
def test_samples_that_are_not_finite_are_counted_apart(bad, tokens, first):
    shape = (2, 3) if tokens is None else (2, tokens, 3)
    good = [torch.randn(shape).softmax(-1) for _ in range(3)]
    mixed, lost = good[1].clone(), torch.full(shape, bad)
    mixed[1, ..., 2] = bad
    batches = [good[0], mixed, lost, good[2]]
    batches = [lost, *batches] if first else batches
    found, expected = RoutingStats(NAMES), RoutingStats(NAMES)
    for batch in batches:
        found.update(batch)
    for batch in (good[0], good[1][:1], good[2]):
        expected.update(batch)
    assert found.non_finite_samples == (5 if first else 3)
    assert expected.non_finite_samples == 0
    assert found.usage == expected.usage
    assert found.mean_weights == pytest.approx(expected.mean_weights, rel=1e-6)
    assert found.current_weights == pytest.approx(expected.current_weights, rel=1e-6)
    assert found.entropy == pytest.approx(expected.entropy, rel=1e-6)
    found.reset()
    assert found.non_finite_samples == 0


def test_weights_that_are_not_finite_are_reported_once_until_reset():
    stats = RoutingStats(NAMES)
    stats.update(torch.tensor([[math.nan, 0.5, 0.5], [0.2, 0.3, 0.5]]))
    assert "NaN or infinite for 1 of the last 2 samples" in stats.collapse_warning()
    assert stats.collapse_warning() is None
    assert stats.mean_weights == pytest.approx([0.2, 0.3, 0.5])
    lost = RoutingStats(NAMES)
    lost.update(torch.full((2, 3), math.nan))
    assert lost.usage == [0, 0, 0]
    assert all(math.isnan(weight) for weight in lost.mean_weights)
    assert lost.idle_experts() == ()


def test_transformed_calls_are_not_counted():
    stats = RoutingStats(NAMES)
    weights = torch.randn(4, 2, 3).softmax(-1)

    def used(weights):
        stats.update(weights)
        return weights.square().sum()

    torch.func.vmap(used)(weights)
    torch.func.grad(used)(weights[0])
    torch.jit.trace(used, weights[0], check_trace=False)
    assert stats.usage == [0, 0, 0]
    stats.update(weights[0])
    assert sum(stats.usage) == 2


def test_no_update_of_several_threads_is_lost():
    stats = RoutingStats(["a", "b"])
    barrier = threading.Barrier(4)

    def count():
        barrier.wait(timeout=10)
        for _ in range(200):
            stats.update(torch.tensor([[0.75, 0.25]]))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stats.usage == [800, 0]
    assert stats.mean_weights == pytest.approx([0.75, 0.25])
