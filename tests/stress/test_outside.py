"""Blocks driven from outside the model's forward: right, or an error that says what to do.

Uniform mixing stands for "nobody said anything" only where there is no router, or where the mode is
uniform.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from stress.toys import EXPERTS, Net, Toy, assert_close, equal_or_clear_error, latents, rows
from torch import Tensor, nn

import moe_lora

UNIFORM = torch.full((EXPERTS,), 1 / EXPERTS)


def raises_unrouted() -> pytest.RaisesExc:
    return pytest.raises((RuntimeError, ValueError), match=r"moe_lora\.route")


def block_of(toy: Toy, x: Tensor, weights: Tensor, index: int = 0) -> Tensor:
    """Return the reference's output of one block under given weights."""
    found = []
    handle = toy.reference.model.blocks[index].register_forward_hook(
        lambda _, args, out: found.append(out)
    )
    run, toy.reference.model.run = toy.reference.model.run, lambda block, _: block(x)
    try:
        toy.reference([toy.mixture(weights)], x)
    finally:
        toy.reference.model.run = run
        handle.remove()
    return found[0]


def fresh(toy: Toy, x: Tensor) -> None:
    """Do nothing: no pass has run."""


def after_a_pass(toy: Toy, x: Tensor) -> None:
    toy.model(x)


def after_a_pass_without_gradient(toy: Toy, x: Tensor) -> None:
    with torch.inference_mode():
        toy.model(x)


def after_a_given_pass(toy: Toy, x: Tensor) -> None:
    with moe_lora.route(toy.model, rows(1)):
        toy.model(x)


def after_a_uniform_pass(toy: Toy, x: Tensor) -> None:
    moe_lora.set_routing_mode(toy.model, "uniform")
    toy.model(x)
    moe_lora.set_routing_mode(toy.model, "routed")


def after_a_disabled_pass(toy: Toy, x: Tensor) -> None:
    for module in toy.model.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(False)
    toy.model(x)
    for module in toy.model.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(True)


def after_merging_and_back(toy: Toy, x: Tensor) -> None:
    moe_lora.merge(toy.model, UNIFORM)
    toy.model(x)
    moe_lora.unmerge(toy.model)


def after_an_exception(toy: Toy, x: Tensor) -> None:
    with pytest.raises(RuntimeError):
        toy.model(torch.randn(2, 5, 7))
    handle = toy.model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy.model(x)
    handle.remove()


def in_a_context_that_says_nothing_of_weights(toy: Toy, x: Tensor) -> None:
    name = toy.model.peft_config["default"].expert_names[0]
    with moe_lora.ablation.ablate_expert(toy.model, name), raises_unrouted():
        toy.model.blocks[0](x)
    with moe_lora.routing.teach_experts(toy.model, torch.eye(EXPERTS)[:2]), raises_unrouted():
        toy.model.blocks[0](x)


BEFORE = [
    fresh,
    after_a_pass,
    after_a_pass_without_gradient,
    after_a_given_pass,
    after_a_uniform_pass,
    after_a_disabled_pass,
    after_merging_and_back,
    after_an_exception,
    in_a_context_that_says_nothing_of_weights,
]


@pytest.mark.parametrize("before", BEFORE)
def test_a_block_of_a_routed_model_raises_outside_of_a_pass(before):
    toy, x, w = Toy(), latents(0), rows(2)
    before(toy, x)
    with raises_unrouted():
        toy.model.blocks[0](x)
    with raises_unrouted():
        toy.model.blocks[0].first(x)
    with raises_unrouted():
        toy.model.forward(x)
    with moe_lora.route(toy.model, w):
        assert_close(toy.model.blocks[0](x), block_of(toy, x, w))
        assert_close(toy.model.forward(x), toy.expected(x, w))
    with raises_unrouted():
        toy.model.blocks[0](x)
    assert_close(toy.model(x), toy.expected(x))


@pytest.mark.parametrize("before", BEFORE[:4])
def test_a_block_runs_uniformly_without_a_router_or_in_uniform_mode(before):
    x = latents(0)
    for routed in (False, True):
        toy = Toy(routed=routed)
        before(toy, x)
        if routed:
            moe_lora.set_routing_mode(toy.model, "uniform")
        for index, block in enumerate(toy.model.blocks):
            assert_close(block(x), block_of(toy, x, UNIFORM, index))
        assert_close(toy.model.forward(x), toy.expected(x, UNIFORM))


@pytest.mark.parametrize("weights", [rows(1), rows(1)[0], rows(1)[:, None].repeat(1, 5, 1)])
def test_a_block_inside_a_context_uses_its_weights(weights):
    toy, x, y = Toy(), latents(0), latents(1)
    with moe_lora.route(toy.model, weights):
        toy.model(y)
        assert_close(toy.model.blocks[1](x), block_of(toy, x, weights, 1))
        with moe_lora.route(toy.model, rows(3)):
            assert_close(toy.model.blocks[1](x), block_of(toy, x, rows(3), 1))
        assert_close(toy.model.blocks[1](x), block_of(toy, x, weights, 1))


def test_an_expert_that_is_left_out_is_left_out_of_a_block_that_is_driven_under_given_weights():
    toy, x, w = Toy(), latents(0), rows(1)
    name = toy.model.peft_config["default"].expert_names[0]
    without = w * torch.tensor([0.0, 1.0, 1.0])
    expected = block_of(toy, x, without)
    with moe_lora.route(toy.model, w), moe_lora.ablation.ablate_expert(toy.model, name):
        assert_close(toy.model.blocks[0](x), expected)
    with moe_lora.ablation.ablate_expert(toy.model, name), moe_lora.route(toy.model, w):
        assert_close(toy.model.blocks[0](x), expected)


@pytest.mark.parametrize("routed", [False, True])
def test_what_a_context_says_holds_for_uniform_blocks_or_raises(routed):
    toy, x = Toy(routed=routed), latents(0)
    if routed:
        moe_lora.set_routing_mode(toy.model, "uniform")
    name = toy.model.peft_config["default"].expert_names[0]
    expected = block_of(toy, x, UNIFORM * torch.tensor([0.0, 1.0, 1.0]))
    with moe_lora.ablation.ablate_expert(toy.model, name):
        equal_or_clear_error(lambda: toy.model.blocks[0](x), expected)
    B = toy.model.blocks[0].second.moe_lora_experts["default"].lora_B

    def learn() -> Tensor:
        with moe_lora.routing.teach_experts(
            toy.model, torch.tensor([[0.0, 1.0, 0.0]]).repeat(2, 1)
        ):
            out = toy.model.blocks[0](x)
        (grad,) = torch.autograd.grad(out.square().sum(), B)
        return grad

    (grad,) = torch.autograd.grad(block_of(toy, x, UNIFORM).square().sum(), B)
    equal_or_clear_error(learn, grad * torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1))


def test_one_pass_and_then_a_forward_of_another_input_is_no_pass():
    toy, x, y = Toy(), latents(0), latents(1)
    assert_close(toy.model(x), toy.expected(x))
    with raises_unrouted():
        toy.model.forward(y)
    assert_close(toy.model(y), toy.expected(y))


def pickled(block: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(block))


def saved(block: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("called_before", [False, True])
def test_a_copied_block_in_the_place_of_the_old_one_is_routed(make, called_before):
    toy, x, y, w = Toy(), latents(0), latents(1), rows(1)
    if called_before:
        toy.model(x)
    toy.model.blocks[0] = make(toy.model.blocks[0])
    for inputs in (x, y):
        assert_close(toy.model(inputs), toy.expected(inputs))
    with moe_lora.route(toy.model, w):
        assert_close(toy.model(x), toy.expected(x, w))
    loss = toy.model(x).square().mean()
    learned = list(toy.learned().values())
    wanted = torch.autograd.grad(toy.expected(x).square().mean(), learned)
    assert_close(torch.autograd.grad(loss, learned), wanted)
    with raises_unrouted():
        toy.model.blocks[0](x)


@pytest.mark.parametrize("make", COPIES)
def test_a_copied_block_by_itself_is_not_mixed_uniformly(make):
    toy, x = Toy(), latents(0)
    toy.model(x)
    block = make(toy.model.blocks[0])
    with raises_unrouted():
        block(x)
    with raises_unrouted():
        nn.Sequential(block)(x)


@pytest.mark.parametrize("make", COPIES)
def test_a_copied_block_of_a_uniform_mixture_stays_uniform(make):
    toy, x = Toy(routed=False), latents(0)
    assert_close(make(toy.model.blocks[0])(x), block_of(toy, x, UNIFORM))


@pytest.mark.parametrize("make", [lambda block: block, *COPIES])
def test_a_block_that_moved_into_another_model_is_routed_by_that_model_or_raises(make):
    first, second, x = Toy(), Toy(seed=5), latents(0)
    plain = Net()
    plain.blocks[0] = make(first.model.blocks[0])
    with raises_unrouted():
        plain(x)
    second.model.blocks[0] = make(first.model.blocks[0])
    weights = rows(1)
    expected = second.expected(x, weights)
    try:
        with moe_lora.route(second.model, weights):
            found = second.model(x)
    except (RuntimeError, ValueError) as error:
        if "moe_lora.route" not in str(error):
            raise
        return
    assert_close(found, expected)


def test_a_functional_call_is_routed_by_the_parameters_that_it_is_given():
    toy, x = Toy(), latents(0)
    doubled = {name: 2 * p.detach() for name, p in toy.learned().items()}
    found = torch.func.functional_call(toy.model, doubled, (x,))
    twice = Toy()
    with torch.no_grad():
        for p in twice.learned().values():
            p.mul_(2)
    assert_close(found, twice.expected(x))
    assert_close(toy.model(x), toy.expected(x))
    block = toy.model.blocks[0]
    with raises_unrouted():
        torch.func.functional_call(block, dict(block.named_parameters()), (x,))


@pytest.mark.parametrize("strict", [False, True])
def test_exporting_a_routed_block_raises_instead_of_baking_weights_in(strict):
    toy, x = Toy(), latents(0)
    toy.model(x)
    block = toy.model.blocks[0].eval()
    with pytest.raises(Exception, match=r"moe_lora\.route|rout"):
        torch.export.export(block, (x,), strict=strict)
    with moe_lora.route(toy.model, rows(1)), pytest.raises(Exception, match="rout"):
        torch.export.export(block, (x,), strict=strict)
    assert_close(toy.model(x), toy.expected(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_block_of_a_uniform_mixture_is_uniform(strict):
    toy, x = Toy(routed=False), latents(0)
    program = torch.export.export(toy.model.blocks[0].eval(), (x,), strict=strict)
    assert_close(program.module()(x), block_of(toy, x, UNIFORM))
