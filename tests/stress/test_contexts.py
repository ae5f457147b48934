"""The weights of `route` apply in the task and the thread that opened it."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from stress.toys import Toy, assert_close, in_threads, latents, meet, rows
from torch import Tensor

import moe_lora


def test_tasks_that_interleave_inside_a_context_see_their_own():
    toy, x = Toy(), latents(0)
    given = [rows(seed) for seed in range(3)]

    async def task(w: Tensor) -> list[Tensor]:
        found = []
        with moe_lora.route(toy.model, w):
            for _ in range(3):
                await asyncio.sleep(0)  # the other tasks' turn
                found.append(toy.model(x))
        await asyncio.sleep(0)
        return [*found, toy.model(x)]

    async def together() -> list[list[Tensor]]:
        return await asyncio.gather(*map(task, given))

    for outputs, w in zip(asyncio.run(together()), given, strict=True):
        for found in outputs[:-1]:
            assert_close(found, toy.expected(x, w))
        assert_close(outputs[-1], toy.expected(x))


def test_a_call_handed_to_a_thread_with_its_context_uses_the_weights_of_the_context():
    toy, x = Toy(), latents(0)
    v, w = rows(1), rows(2)
    expected = [toy.expected(x, v), toy.expected(x, w)]
    meet(2, *toy.model.blocks)

    async def task(weights: Tensor) -> Tensor:
        with moe_lora.route(toy.model, weights):
            return await asyncio.to_thread(toy.model, x)

    async def together() -> list[Tensor]:
        return await asyncio.gather(task(v), task(w))

    for got, wanted in zip(asyncio.run(together()), expected, strict=True):
        assert_close(got, wanted)


def test_a_thread_sees_the_weights_of_a_context_only_where_it_is_handed_the_context():
    toy, x, w = Toy(), latents(0), rows(1)
    with moe_lora.route(toy.model, w):
        context = contextvars.copy_context()
        without, handed = in_threads(lambda: toy.model(x), lambda: context.run(toy.model, x))
    assert_close(without, toy.expected(x))
    assert_close(handed, toy.expected(x, w))


def test_contexts_that_are_left_in_another_order_leave_nothing():
    toy, x = Toy(), latents(0)
    first, second = moe_lora.route(toy.model, rows(1)), moe_lora.route(toy.model, rows(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert_close(toy.model(x), toy.expected(x))


@pytest.fixture
def compiled() -> Iterator[Toy]:
    """A toy whose model is compiled as a whole, with what the reference says in `expected`."""
    torch._dynamo.reset()
    toy = Toy()
    toy.called = torch.compile(toy.model, backend="eager")
    yield toy
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["routed", "uniform"])
def test_tasks_that_interleave_around_a_compiled_model_see_their_own(compiled, mode):
    toy, x = compiled, latents(0)
    moe_lora.set_routing_mode(toy.model, mode)
    given = [rows(seed) for seed in range(3)]

    async def task(w: Tensor) -> list[Tensor]:
        with moe_lora.route(toy.model, w):
            await asyncio.sleep(0)
            first = toy.called(x)
            await asyncio.sleep(0)
            found = [first, toy.called(x)]
        await asyncio.sleep(0)
        return [*found, toy.called(x)]

    async def together() -> list[list[Tensor]]:
        return await asyncio.gather(*map(task, given))

    nothing = torch.full((2, 3), 1 / 3) if mode == "uniform" else None
    for outputs, w in zip(asyncio.run(together()), given, strict=True):
        for found in outputs[:-1]:
            assert_close(found, toy.expected(x, w))
        assert_close(outputs[-1], toy.expected(x, nothing))
    assert_close(toy.called(x), toy.expected(x, nothing))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["routed", "uniform"])
def test_a_compiled_call_handed_to_a_thread_with_its_context_uses_its_weights(compiled, mode):
    toy, x, w = compiled, latents(0), rows(1)
    moe_lora.set_routing_mode(toy.model, mode)
    nothing = torch.full((2, 3), 1 / 3) if mode == "uniform" else None
    in_threads(lambda: toy.called(x))
    with moe_lora.route(toy.model, w):
        context = contextvars.copy_context()
        without, handed = in_threads(lambda: toy.called(x), lambda: context.run(toy.called, x))
    assert_close(without, toy.expected(x, nothing))
    assert_close(handed, toy.expected(x, w))
