from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

from moe_lora.routing.weights.context import RoutingContext
from moe_lora.routing.weights.routing import Routing

W = torch.tensor([[0.5, 0.3, 0.2]])


def routing() -> Routing:
    return Routing.from_weights({"a": W})


@pytest.fixture
def context() -> RoutingContext:
    made = RoutingContext()
    made.routed_adapters.add("a")
    return made


def test_passes_nest_and_give_the_outer_one_back(context):
    outer, inner = routing(), routing()
    with context.use(outer):
        with context.use(inner):
            assert context.routing_for("a") is inner
        assert context.routing_for("a") is outer
    assert context.current() is None


def test_a_pass_that_ends_in_an_error_is_over(context):
    with pytest.raises(KeyError), context.use(routing()):
        raise KeyError
    assert context.current() is None


def test_another_thread_has_no_part_in_a_pass(context):
    found = []
    with context.use(routing()):
        thread = threading.Thread(target=lambda: found.append(context.current()))
        thread.start()
        thread.join()
    assert found == [None]


def test_without_a_pass_an_adapter_with_a_router_raises_and_another_is_uniform(context):
    with pytest.raises(RuntimeError, match=r"moe_lora\.route"):
        context.routing_for("a")
    assert context.routing_for("b").weights == {}


def test_a_pass_that_says_nothing_of_an_adapter_with_a_router_raises(context):
    with context.use(Routing({"b": None})), pytest.raises(RuntimeError, match="'a'"):
        context.routing_for("a")


def test_the_end_of_a_pass_that_never_began_does_no_harm(context):
    assert context.exit(1) is None
    with context.use(routing()):
        assert context.current() is not None


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_copies_are_of_one_lineage_and_require_by_themselves(context, copied):
    other = copied(context)
    other.routed_adapters = {*other.routed_adapters, "b"}
    assert context.routed_adapters == {"a"}
    with context.use(routing()) as _:
        assert other.current() is context.current()
    stranger = RoutingContext()
    with context.use(routing()):
        assert stranger.current() is None


def test_the_pass_of_an_output_is_found_in_its_backward_pass_and_nowhere_else(context):
    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(context.current())
            return grad

    seen, passes = [], [routing(), routing()]
    x = torch.ones(2, requires_grad=True)
    outputs = []
    for one in passes:
        out = Probe.apply(x) * 2
        context.restore_in_backward({"sample": [out], "other": None}, one)
        outputs.append(out)
    outputs[0].sum().backward()
    assert seen == [passes[0]]
    assert context.current() is None
    seen.clear()
    x = torch.ones(2, requires_grad=True)
    outputs = []
    for one in passes:
        out = Probe.apply(x) * 2
        context.restore_in_backward((out,), one)
        outputs.append(out)
    with context.use(routing()):
        running = context.current()
        (outputs[0].sum() + outputs[1].sum()).backward()
        assert context.current() is running
    assert seen == passes[::-1]  # the later pass comes first on the way back


def test_a_backward_pass_that_fails_leaves_nothing(context):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyError

    out = Broken.apply(torch.ones(2, requires_grad=True)) * 2
    one = routing()
    context.restore_in_backward(out, one)
    with pytest.raises(KeyError):
        out.sum().backward()
    assert context.current() is None
    with context.use(routing()):
        pass
    alive = weakref.ref(one)
    del out, one
    gc.collect()
    assert alive() is None
