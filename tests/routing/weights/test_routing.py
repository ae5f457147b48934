from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from moe_lora.routing.weights.routing import Routing, zero_expert_weight

W = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]])


def test_a_routing_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Routing.from_weights({"a": W}).weights = {}


def test_every_routing_has_a_version_of_its_own_and_uniform_ones_share_theirs():
    versions = [int(Routing.from_weights({"a": W}).version) for _ in range(3)]
    assert len(set(versions)) == 3
    assert int(Routing({"a": None}).version) == int(Routing().version) == 0
    assert 0 not in versions


def test_changes_return_a_new_routing():
    routing = Routing.from_weights({"a": W, "b": None})
    masked = routing.with_grad_mask(torch.ones(2, 3))
    ablated = routing.without_expert("b", 0, 2, renormalize=True)
    assert routing.expert_grad_mask is None
    assert routing.weights["b"] is None
    assert ablated.weights["b"].tolist() == [0.0, 1.0]
    assert ablated.weights["a"] is W
    assert len({int(r.version) for r in (routing, masked, ablated)}) == 3


@pytest.mark.parametrize(
    ("weights", "k", "chosen"),
    [(W, 2, True), (W, 3, False), (W, None, False), (W[0], 2, False), (W[None], 2, False)],
)
def test_experts_are_chosen_per_sample_where_not_all_count(weights, k, chosen):
    routing = Routing.from_weights({"a": weights}, {"a": k})
    assert ("a" in routing.expert_indices) == chosen
    if chosen:
        assert routing.expert_indices["a"].shape == (2, k)
        assert 1 in routing.expert_indices["a"][1]


def test_weights_per_layer_are_those_of_the_layer():
    weights = torch.rand(2, 4, 3)
    routing = Routing.from_weights({"a": weights}, {"a": 1}, {"a": "layers"})
    found, indices = routing.select_layer("a", torch.tensor([2]))
    assert torch.equal(found, weights[:, 2])
    assert torch.equal(indices, weights[:, 2].topk(1).indices)
    assert routing.token_grid("a") is None


def test_only_token_weights_of_an_image_have_a_grid():
    routing = Routing.from_weights({"a": torch.rand(1, 6, 3), "b": W}, dimension={"a": (2, 3)})
    assert routing.token_grid("a") == (2, 3)
    assert routing.token_grid("b") is None


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (Routing({"a": W.clone(), "b": None}), True),
        (Routing({"a": W + 0.1, "b": None}), False),
        (Routing({"a": W}), False),
        (Routing({"a": W, "b": W}), False),
        (Routing({"a": W, "b": None}, expert_grad_mask=torch.ones(2, 3)), False),
    ],
)
def test_routings_are_compared_by_their_values(other, same):
    routing = Routing({"a": W, "b": None})
    assert routing.equals(other) == same
    assert other.equals(routing) == same


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_lone_expert_that_is_left_out_leaves_nothing(renormalize):
    assert zero_expert_weight(W, 1, renormalize=renormalize)[1].tolist() == [0.0, 0.0, 0.0]


def test_versions_are_on_the_cpu_and_can_be_saved_for_backward():
    with torch.device("meta"), torch.inference_mode():
        version = Routing.from_weights({"a": W}).version
    assert version.device.type == "cpu"
    assert not version.is_inference()
    assert pickle.loads(pickle.dumps(int(version))) == int(version)
