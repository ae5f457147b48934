from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.fixed import FixedRouter, UniformRouter
from moe_lora.routing.routers.registry import router_class

NAMES = ("removal_expert", "background_expert", "completion_expert")


def call(batch: int = 2, hint: str | list[str] | None = None) -> RouterInputs:
    return RouterInputs(torch.randn(batch, 4, 8), task_hint=hint)


def test_both_are_registered():
    assert router_class("uniform") is UniformRouter
    assert router_class("fixed") is FixedRouter


@pytest.mark.parametrize("experts", [1, 3, 5])
def test_uniform_gives_one_over_e(experts):
    router = UniformRouter().configure([f"expert_{i}" for i in range(experts)])
    weights = router(call()).weights
    torch.testing.assert_close(weights, torch.full((2, experts), 1 / experts))
    torch.testing.assert_close(router.fixed_weights(), weights[0])


def test_uniform_needs_to_know_its_experts():
    with pytest.raises(ValueError, match="Call configure"):
        UniformRouter()(call())


@pytest.mark.parametrize(("strategy", "top_k"), [("hard", None), ("topk", 2)])
def test_uniform_refuses_to_choose_among_equals(strategy, top_k):
    with pytest.raises(ValueError, match='to be "soft" with the uniform router'):
        UniformRouter().configure(NAMES, strategy=strategy, top_k=top_k)


def test_uniform_follows_hints():
    router = UniformRouter().configure(NAMES)
    tilted = router(call(hint="completion_focus")).weights
    assert (tilted[:, 2] > 0.7).all()
    only = router(call(hint="completion_only")).weights
    assert torch.equal(only, torch.tensor([[0.0, 0.0, 1.0]] * 2))


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [0.0, 1.0, 0.0], [0.6, 0.4, 0.0]])
def test_fixed_gives_its_weights(weights):
    router = FixedRouter(weights).configure(NAMES)
    routed = router(call()).weights
    torch.testing.assert_close(routed, torch.tensor([weights] * 2))
    torch.testing.assert_close(router.fixed_weights(), torch.tensor(weights))
    assert ((routed == 0) == (torch.tensor([weights] * 2) == 0)).all()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.5}, [0.04 / 0.38, 0.25 / 0.38, 0.09 / 0.38]),
        ({"strategy": "hard"}, [0.0, 1.0, 0.0]),
        ({"strategy": "topk", "top_k": 2}, [0.0, 0.5 / 0.8, 0.3 / 0.8]),
    ],
)
def test_fixed_weights_are_what_forward_gives(settings, expected):
    router = FixedRouter([0.2, 0.5, 0.3]).configure(NAMES, **settings)
    torch.testing.assert_close(router.fixed_weights(), torch.tensor(expected))
    torch.testing.assert_close(router(call(1)).weights[0], router.fixed_weights())


@pytest.mark.parametrize("kind", ["focus", "only"])
def test_a_hint_to_an_expert_without_weight_raises(kind):
    router = FixedRouter([0.5, 0.5, 0.0]).configure(NAMES)
    assert router(call(hint=f"removal_{kind}")).weights[0, 0] > 0.8
    for hint in (f"completion_{kind}", [f"completion_{kind}"]):
        with pytest.raises(ValueError, match="fixed weight of 'completion_expert' is 0"):
            router(call(hint=hint))


def test_an_unknown_hint_raises():
    with pytest.raises(ValueError, match="Expected `task_hint` to be one of"):
        FixedRouter([1.0, 0.0, 0.0]).configure(NAMES)(call(hint="shadow_only"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.7, 0.7, -0.4], "Expected `weights` to be >= 0"),
        ([float("nan"), 0.5, 0.5], "Expected `weights` to be >= 0"),
        ([0.2, 0.2, 0.2], r"Expected `weights` to sum to 1, but .* sum to 0.6"),
        ([], r"Expected `weights` to sum to 1"),
    ],
)
def test_weights_that_are_no_mixture_raise(weights, message):
    with pytest.raises(ValueError, match=message):
        FixedRouter(weights)


def test_another_number_of_experts_raises():
    with pytest.raises(ValueError, match="one entry per expert, 3 in all, but got 2"):
        FixedRouter([0.5, 0.5]).configure(NAMES)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_and_checkpoints_can_rebuild_it(clone):
    router = FixedRouter([0.25, 0.25, 0.5]).configure(NAMES, temperature=2.0)
    twin = clone(router)
    assert twin.init_kwargs == router.init_kwargs == {"weights": [0.25, 0.25, 0.5]}
    assert torch.equal(twin(call()).weights, router(call()).weights)
    rebuilt = FixedRouter(**json.loads(json.dumps(router.init_kwargs)))
    assert rebuilt.weights == router.weights
