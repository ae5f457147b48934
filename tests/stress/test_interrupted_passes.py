"""Passes that begin, or end, in no orderly way: what comes after them has its own routing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from stress.test_nested_calls import once
from stress.toys import Net, Toy, adapt, assert_close, latents, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_lora


class FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        raise ArithmeticError


def fail(*_: object) -> None:
    raise ArithmeticError


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def entries(model: nn.Module) -> int:
    """Count what this thread remembers of passes of a model."""
    stack = model.moe_router.state._stacks.stack
    return len(stack.outer) + (stack.top.routing is not None)


@pytest.mark.parametrize("others", [0, 1])
def test_an_inner_call_that_failed_before_it_began_leaves_the_outer_ones_alone(others):
    toy, x, y = Toy(), latents(0), latents(1, batch=3)

    def between(h: Tensor) -> Tensor:
        handle = toy.model.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(ArithmeticError):
            toy.model(h[:1])
        handle.remove()
        return h

    def outer(h: Tensor) -> Tensor:
        toy.model.between = once(toy.model, between)
        assert_close(toy.model(y), expected[1])
        return h

    expected = [toy.expected(x), toy.expected(y)]
    toy.model.between = once(toy.model, outer if others else between)
    assert_close(toy.model(x), expected[0])
    assert entries(toy.model) == 0


@pytest.mark.parametrize("error", [fail, interrupt])
def test_calls_that_were_interrupted_do_not_pile_up(error):
    toy, x, y = Toy(), latents(0), latents(1, batch=3)
    for _ in range(3):
        handle = toy.model.blocks[1].register_forward_pre_hook(error)
        with pytest.raises((ArithmeticError, KeyboardInterrupt)):
            toy.model(x)
        handle.remove()
    assert_close(toy.model(y), toy.expected(y))
    assert entries(toy.model) == 0
    with pytest.raises(RuntimeError, match="outside of a call"):
        toy.model.blocks[0](x)


def test_an_inner_call_that_was_interrupted_leaves_the_outer_one_its_routing():
    toy, x = Toy(), latents(0)
    expected = toy.expected(x)

    def between(h: Tensor) -> Tensor:
        handle = toy.model.blocks[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy.model(h[:1])
        handle.remove()
        return toy.model(h) * 0 + h

    toy.model.between = once(toy.model, between)
    # The pass after the interrupted one forgets it.
    assert_close(toy.model(x), expected)
    assert entries(toy.model) == 0


def test_a_context_that_a_hook_enters_in_one_pass_and_leaves_in_the_next():
    toy, x, y = Toy(3), latents(0), latents(1, batch=3)
    w, calls = rows(1, batch=3), []
    context = moe_lora.route(toy.model, w)

    def hook(*_: object) -> None:
        calls.append(None)
        if len(calls) == 1:
            context.__enter__()
        else:
            context.__exit__(None, None, None)

    expected = toy.expected(y, w), toy.expected(y)
    handle = toy.model.blocks[2].register_forward_pre_hook(hook)
    with pytest.raises(ValueError, match="samples"):
        toy.model(x)  # the weights are for another batch
    assert_close(toy.model(y), expected[0])  # a pass keeps the weights that it began with
    handle.remove()
    assert entries(toy.model) == 0
    assert_close(toy.model(y), expected[1])


def test_a_backward_pass_that_fails_inside_a_pass_leaves_it_its_routing():
    toy, x = Toy(), latents(0)
    expected = toy.expected(x)
    toy.model.run = lambda block, h: checkpoint(block, h, use_reentrant=False)

    def between(h: Tensor) -> Tensor:
        out = toy.model(FailingBackward.apply(latents(1, batch=3).requires_grad_()))
        with pytest.raises(ArithmeticError):
            out.sum().backward()
        return h

    toy.model.between = once(toy.model, between)
    out = toy.model(x)
    assert_close(out, expected)
    learned = list(toy.learned().values())
    found = torch.autograd.grad(out.square().mean(), learned)
    assert_close(found, torch.autograd.grad(expected.square().mean(), learned))
    assert entries(toy.model) == 0


class Returning(Net):
    """Returns a parameter, and its input, beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        return super().forward(hidden_states), self.temperature, hidden_states


def test_what_a_pass_returns_but_did_not_compute_collects_no_hooks():
    model, x = adapt(Returning()), latents(0).requires_grad_()
    model.temperature.requires_grad_(True)
    for _ in range(3):
        out, temperature, _ = model(x)
        (out * temperature).sum().backward()
    assert not model.temperature._backward_hooks
    assert not x._backward_hooks


def test_a_deleted_model_is_freed_after_a_chain_of_passes():
    toy = Toy()
    out = toy.model(toy.model(latents(0)))
    out.sum().backward()
    state, model = weakref.ref(toy.model.moe_router.state), weakref.ref(toy.model)
    del toy, out
    gc.collect()
    assert model() is None
    assert state() is None
