"""Activation checkpointing in many guises and orders: the gradients without it, or a clear error.

Every scenario runs twice on the same toy: without checkpointing, and in a guise of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from stress.checkpointed_passes import (
    GUISES,
    KINDS,
    Call,
    Passes,
    blocks,
    compiled,
    reentrant,
    routed,
    selective,
    whole,
    whole_and_blocks,
    without,
    wrapper,
)
from stress.toys import CLEAR, EXPERTS, assert_close, equal_or_clear_error, in_threads
from torch import Tensor, nn

import moe_lora

pytestmark = pytest.mark.slow


def one(passes: Passes) -> None:
    passes.loss(1).backward()


def one_by_autograd_grad(passes: Passes) -> None:
    leaves = [*passes.toy.learned().values(), passes.inputs[0]]
    grads = torch.autograd.grad(passes.loss(0), leaves, allow_unused=True)
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad


def one_in_another_thread(passes: Passes) -> None:
    # As on a CUDA device, where autograd has threads of its own.
    loss = passes.loss(1)
    in_threads(loss.backward)


def one_then_two_backwards(passes: Passes) -> None:
    loss = passes.loss(0)
    loss.backward(retain_graph=True)
    loss.backward()


def accumulation(passes: Passes) -> None:
    for index in range(3):
        passes.loss(index).backward()


def accumulation_with_previews(passes: Passes) -> None:
    for index, quiet in enumerate((torch.no_grad, torch.inference_mode, torch.no_grad)):
        with quiet():
            passes(2 - index)
        loss = passes.loss(index)
        loss.backward()


SINGLE = [
    one,
    one_by_autograd_grad,
    one_in_another_thread,
    one_then_two_backwards,
    accumulation,
    accumulation_with_previews,
]


def in_order(*order: int) -> Callable[[Passes], None]:
    def scenario(passes: Passes) -> None:
        losses = [passes.loss(index) for index in range(len(order))]
        for index in order:
            losses[index].backward()

    scenario.__name__ = "backward_" + "_".join(map(str, order))
    return scenario


def the_sum(passes: Passes) -> None:
    sum(passes.loss(index) for index in range(3)).backward()


def chain(passes: Passes) -> None:
    x = passes.inputs[0]
    for index in range(3):
        x = passes(index, x)
    x.square().mean().backward()


def previews_before_backward(passes: Passes) -> None:
    loss = passes.loss(0)
    with torch.no_grad():
        passes(1)
    with torch.inference_mode():
        passes(2)
    loss.backward()


def backward_inside_another_context(passes: Passes) -> None:
    loss = passes.loss(0)
    with moe_lora.route(passes.model, torch.eye(EXPERTS)[0]):
        loss.backward()


def backward_twice_around_another_pass(passes: Passes) -> None:
    loss = passes.loss(0)
    loss.backward(retain_graph=True)
    passes.loss(1).backward()
    loss.backward()


def gradient_of_some_then_of_the_others(passes: Passes) -> None:
    losses = [passes.loss(index) for index in range(2)]
    leaves = [*passes.toy.learned().values()]
    first = torch.autograd.grad(losses[0], leaves, retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(losses[1], leaves, allow_unused=True)
    losses[0].backward()
    for leaf, *grads in zip(leaves, first, second, strict=True):
        for weight, grad in zip((3, 5), grads, strict=True):
            if grad is not None:
                leaf.grad = weight * grad + (0 if leaf.grad is None else leaf.grad)


def threads(passes: Passes) -> None:
    losses = [passes.loss(index) for index in range(3)]
    for loss in losses:
        in_threads(loss.backward)


def inner_only(passes: Passes) -> None:
    """A loss on an inner block's output of the first of two passes."""
    passes(0)
    loss = passes.inner[0].square().mean()
    passes(1)
    loss.backward()


def inner_with_the_output_of_a_later_pass(passes: Passes) -> None:
    passes(0)
    loss = passes.inner[0].square().mean()
    (loss + passes.loss(1)).backward()


def inner_and_outer(passes: Passes) -> None:
    first, second = passes.loss(0), passes.loss(1)
    (first + passes.inner[0].square().mean()).backward()
    (second + passes.inner[1].square().mean()).backward()


def inner_of_all(passes: Passes) -> None:
    losses = [passes.loss(index) + passes.inner[index].square().mean() for index in range(3)]
    sum(losses).backward()


SEVERAL = [
    *(in_order(*order) for order in ((0, 1), (1, 0), (1, 2, 0), (2, 0, 1), (2, 1, 0))),
    the_sum,
    chain,
    previews_before_backward,
    backward_inside_another_context,
    backward_twice_around_another_pass,
    gradient_of_some_then_of_the_others,
    threads,
    inner_only,
    inner_and_outer,
    inner_of_all,
]


def gradients(scenario: Callable[[Passes], None], guise: object, kind: str) -> list[Tensor]:
    passes = Passes(guise, kind)
    scenario(passes)
    return passes.gradients()


@pytest.fixture(autouse=True, scope="module")
def _shared_compiler():
    """Let the toys, which are alike, share compiled blocks; none may fall back to eager."""
    torch._dynamo.reset()
    # A graph that gives its buffers away after one backward pass cannot serve those that need two.
    with (
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),
        torch._functorch.config.patch(donated_buffer=False),
    ):
        yield
    torch._dynamo.reset()


@functools.cache
def wanted(scenario: Callable[[Passes], None], kind: str) -> list[Tensor]:
    return gradients(scenario, without, kind)


# Every kind in two guises, and in the others those two that differ most.
CASES = [
    (guise, kind)
    for guise in GUISES
    for kind in (KINDS if guise in (blocks, wrapper) else ("router", "given"))
]
named = pytest.mark.parametrize(
    ("guise", "kind"), CASES, ids=[f"{guise.__name__}-{kind}" for guise, kind in CASES]
)


def clear_of(guise: object) -> str:
    # Around the whole call there is nothing of ours, and torch has an error of its own; selective
    # checkpointing serves one backward pass.
    own = {
        whole: r"|torch\.utils\.checkpoint:",
        whole_and_blocks: r"|torch\.utils\.checkpoint:",
        selective: "|only allowed to backward once",
    }
    return CLEAR + own.get(guise, "")


@named
@pytest.mark.parametrize("scenario", SINGLE)
def test_one_pass_at_a_time_has_the_gradients_that_it_has_without(scenario, guise, kind):
    expected = wanted(scenario, kind)
    twice = guise is selective and scenario is one_then_two_backwards
    around = guise in (whole, whole_and_blocks) and kind != "router"
    if guise is reentrant or twice or around:
        # Reentrant ones cannot carry gradients to weights; those around the whole call run it
        # again, when the context that it was made in is gone.
        equal_or_clear_error(lambda: gradients(scenario, guise, kind), expected, clear_of(guise))
    else:
        assert_close(gradients(scenario, guise, kind), expected)


@named
@pytest.mark.parametrize("scenario", SEVERAL)
def test_several_passes_have_the_gradients_that_they_have_without_or_raise(scenario, guise, kind):
    expected = wanted(scenario, kind)
    equal_or_clear_error(lambda: gradients(scenario, guise, kind), expected, clear_of(guise))


@pytest.mark.parametrize("kind", ["router", "given"])
@pytest.mark.parametrize("guise", [blocks, wrapper, routed, compiled])
@pytest.mark.parametrize("scenario", [in_order(1, 0), the_sum, chain, previews_before_backward])
def test_the_usual_orders_are_no_error(scenario, guise, kind):
    expected = wanted(scenario, kind)
    assert_close(gradients(scenario, guise, kind), expected)


def routed_and_compiled(model: nn.Module) -> Call:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return routed(model)


@pytest.mark.parametrize("kind", ["router", "given"])
@pytest.mark.parametrize("scenario", [inner_only, inner_with_the_output_of_a_later_pass])
def test_losses_on_inner_features_need_a_routed_checkpoint(scenario, kind):
    expected = wanted(scenario, kind)
    for guise in (routed, routed_and_compiled):
        assert_close(gradients(scenario, guise, kind), expected)
    with pytest.raises(RuntimeError, match="routed_checkpoint"):
        gradients(scenario, blocks, kind)


def test_the_gradients_without_checkpointing_are_those_of_the_reference():
    passes = Passes(without, "given")
    the_sum(passes)
    found = passes.gradients()
    other = Passes(without, "given")
    loss = torch.zeros(())
    for index, (x, w) in enumerate(zip(other.inputs, other.given, strict=True)):
        loss = loss + (1 + index) * other.toy.expected(x, w.softmax(-1)).square().mean()
    loss.backward()
    assert_close(found, other.gradients())


@pytest.mark.parametrize("order", [(0,), (0, 1), (1, 0), (2, 0, 1)])
def test_a_model_of_diffusers_that_checkpoints_by_itself(
    make_flux, make_flux_inputs, flux_targets, order
):
    found = []
    for checkpointing in (False, True):
        model = make_flux().eval()
        torch.manual_seed(2)
        model.add_adapter(
            moe_lora.MoELoraConfig(
                r=2,
                target_modules=flux_targets,
                router="three_expert_removal",
                init_lora_weights=False,
            )
        )
        if checkpointing:
            model.enable_gradient_checkpointing()
        losses = []
        for index in range(len(order)):
            inputs = make_flux_inputs(batch=1 + index)
            inputs["hidden_states"][:, : 8 * index, 128:] = 1.0
            losses.append((1 + index) * model(**inputs)[0].square().mean())
        with torch.inference_mode():
            model(**make_flux_inputs(batch=4))
        for index in order:
            losses[index].backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_close(*found)
