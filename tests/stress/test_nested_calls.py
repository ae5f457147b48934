"""Calls inside calls, and replicas: every pass has the routing of its own call."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from stress.toys import (
    EXPERTS,
    Net,
    Toy,
    assert_close,
    decided,
    equal_or_clear_error,
    in_threads,
    latents,
    meet,
    rows,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_lora


def once(model: nn.Module, call: object) -> object:
    """Call `call` from the outermost pass of a model, and not from the passes inside of it."""

    def between(x: Tensor) -> Tensor:
        model.between = lambda x: x
        try:
            return call(x)
        finally:
            model.between = between

    return between


def expected_of(toy: Toy, x: Tensor, outer: Tensor, inner: object) -> Tensor:
    """Return what the reference makes of `x` with `inner` called after the first block."""
    reference = toy.reference
    reference.model.between = inner
    try:
        return reference([toy.mixture(outer)], x)
    finally:
        reference.model.between = lambda x: x


def twin(toy: Toy) -> Toy:
    """Return the same model again, for the reference of an inner call."""
    other = Toy(len(toy.model.blocks))
    other.model = toy.model
    return other


@pytest.mark.parametrize("outer_given", [False, True])
@pytest.mark.parametrize("inner_given", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_model_called_inside_its_own_forward(outer_given, inner_given, checkpointed):
    toy, x, v, w = Toy(), latents(0), rows(1), rows(2)
    again = twin(toy)

    def inner_call(h: Tensor) -> Tensor:
        with moe_lora.route(toy.model, w) if inner_given else nullcontext():
            return h + toy.model(h.flip(0))

    def inner_reference(h: Tensor) -> Tensor:
        # What is given for the outer call holds for calls inside it, too.
        return h + again.expected(h.flip(0), w if inner_given else v if outer_given else None)

    outer = v if outer_given else decided(toy.model, x)
    expected = expected_of(toy, x, outer, inner_reference)
    toy.model.between = once(toy.model, inner_call)
    if checkpointed:
        toy.model.run = lambda block, h: checkpoint(block, h, use_reentrant=False)

    def learn() -> list[Tensor]:
        with moe_lora.route(toy.model, v) if outer_given else nullcontext():
            found = toy.model(x)
        assert_close(found, expected)
        return grads(found)

    def grads(out: Tensor) -> list[Tensor]:
        learned = toy.learned().values()
        return torch.autograd.grad(out.square().mean(), list(learned), allow_unused=True)

    if checkpointed:
        equal_or_clear_error(learn, grads(expected))
    else:
        assert_close(learn(), grads(expected))


def test_an_inner_call_that_fails_leaves_the_outer_one_its_routing():
    toy, x = Toy(), latents(0)
    inside = []

    def fail(*_: object) -> None:
        if inside:
            raise ArithmeticError

    def between(h: Tensor) -> Tensor:
        inside.append(True)
        with pytest.raises(ArithmeticError):
            toy.model(h[:1])
        inside.clear()
        return h

    toy.model.blocks[1].register_forward_pre_hook(fail)
    expected = toy.expected(x)
    toy.model.between = once(toy.model, between)
    assert_close(toy.model(x), expected)


@pytest.mark.parametrize("given", [False, True])
def test_a_model_whose_forward_calls_another_adapted_model(given):
    outer, inner, x = Toy(), Toy(seed=5), latents(0)
    w = rows(3)

    def call(h: Tensor) -> Tensor:
        if not given:
            return inner.model(h)
        with moe_lora.route(inner.model, w):
            return inner.model(h)

    expected = expected_of(
        outer,
        x,
        decided(outer.model, x),
        lambda h: h + inner.expected(h, w if given else None) + inner.expected(h),
    )
    outer.model.between = lambda h: h + call(h) + inner.model(h)
    for _ in range(2):
        assert_close(outer.model(x), expected)
    assert_close(inner.model(x), inner.expected(x))


def test_a_model_that_a_hook_of_its_block_calls_again():
    toy, x, y = Toy(), latents(0), latents(1, batch=3)
    seen = []

    def call_again(*_: object) -> None:
        if len(seen) < 3:
            seen.append(None)
            assert_close(toy.model(y), expected[1])

    expected = [toy.expected(x), toy.expected(y)]
    toy.model.blocks[1].register_forward_pre_hook(call_again)
    assert_close(toy.model(x), expected[0])
    assert len(seen) == 3


def replicas(model: nn.Module, count: int) -> list[nn.Module]:
    """Replicate a model as `torch.nn.DataParallel` does, all on one device."""
    modules = list(model.modules())
    place = {module: index for index, module in enumerate(modules)}
    made = []
    for _ in range(count):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, copies, strict=True):
            for name, child in module._modules.items():
                setattr(replica, name, None if child is None else copies[place[child]])
            for name, parameter in module._parameters.items():
                # No leaf any more: its gradient goes on to the parameter.
                setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        made.append(copies[0])
    return made


@pytest.mark.parametrize("given", [False, True])
def test_replicas_in_threads_compute_and_learn_what_the_model_does(given):
    toy, x, w = Toy(), latents(0, batch=4), rows(1, batch=4)
    expected = toy.expected(x, w if given else None)
    learned = list(toy.learned().values())
    wanted = torch.autograd.grad(expected.square().mean(), learned, allow_unused=True)
    meet(2, *toy.model.blocks)

    def call(replica: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        if not given:
            return replica(x)
        with moe_lora.route(replica, w):
            return replica(x)

    pieces = zip(replicas(toy.model, 2), x.chunk(2), w.chunk(2), strict=True)
    found = torch.cat(in_threads(*(lambda piece=piece: call(*piece) for piece in pieces)))
    assert_close(found, expected)
    got = torch.autograd.grad(found.square().mean(), learned, allow_unused=True)
    assert_close(got, wanted)


def test_contexts_around_replicas_raise_in_their_threads():
    toy, x = Toy(), latents(0, batch=4)
    name = toy.model.peft_config["default"].expert_names[0]
    contexts = (
        moe_lora.route(toy.model, rows(1)[0]),
        moe_lora.routing.teach_experts(toy.model, torch.eye(EXPERTS)[:2]),
        moe_lora.ablation.ablate_expert(toy.model, name),
        moe_lora.router_inputs(toy.model, timestep_range=(0.0, 1.0)),
    )
    for context in contexts:
        with context, pytest.raises(RuntimeError, match="around DataParallel"):
            in_threads(*(lambda r=r: r(x) for r in replicas(toy.model, 2)))
    assert_close(
        in_threads(*(lambda r=r: r(x) for r in replicas(toy.model, 1)))[0], toy.expected(x)
    )


def test_models_that_share_blocks_route_each_by_its_own_call():
    base, x, y = Toy(), latents(0), latents(1)
    other = Net()
    other.blocks = base.model.blocks
    assert_close(base.model(x), base.expected(x))
    # The other model has no router of its own, and its blocks are not asked by this one's.
    with pytest.raises((RuntimeError, ValueError), match="route"):
        other(y)
    assert_close(base.model(y), base.expected(y))
