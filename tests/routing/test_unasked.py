from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import moe_lora
from moe_lora import MoELoraConfig, Router, RouterInputs
from moe_lora.routing.control import routing_state
from moe_lora.routing.unasked import hold, is_awaited


class LearnedRouter(Router):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def logits(self, inputs: RouterInputs) -> Tensor:
        return self.head(inputs.hidden_states)


@pytest.fixture
def model(make_mlp: Callable[[], nn.Module]) -> PeftModel:
    made = get_peft_model(make_mlp(), MoELoraConfig(r=2, target_modules=["first", "second"]))
    moe_lora.attach_router(made, LearnedRouter())
    return made


@pytest.fixture
def wrapped(model: PeftModel, one_process: None) -> DistributedDataParallel:
    return DistributedDataParallel(model)


def router_gradients(model: nn.Module) -> list[Tensor | None]:
    return [p.grad for m in model.modules() if isinstance(m, Router) for p in m.parameters()]


def test_by_itself_a_model_has_no_gate_in_uniform_mode(model):
    moe_lora.set_routing_mode(model, "uniform")
    model(torch.randn(2, 6)).sum().backward()
    assert routing_state(model).weights == {}
    assert router_gradients(model) == [None, None]


@pytest.mark.parametrize("given", [False, True])
def test_ddp_goes_on_when_no_router_is_asked_and_leaves_it_without_gradient(wrapped, given):
    weights, x = torch.tensor([0.5, 0.3, 0.2]), torch.randn(2, 6)
    moe_lora.set_routing_mode(wrapped, "uniform")
    for _ in range(3):
        if given:
            with moe_lora.route(wrapped, weights):
                wrapped(x).sum().backward()
        else:
            wrapped(x).sum().backward()
        assert router_gradients(wrapped) == [None, None]
    moe_lora.set_routing_mode(wrapped, "routed")
    wrapped(x).sum().backward()
    assert None not in router_gradients(wrapped)


def test_gradients_of_earlier_passes_stay(wrapped):
    x = torch.randn(2, 6)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    wrapped(x).sum().backward()
    before = [gradient.clone() for gradient in router_gradients(wrapped)]
    moe_lora.set_routing_mode(wrapped, "uniform")
    wrapped(x).sum().backward()
    for found, expected in zip(router_gradients(wrapped), before, strict=True):
        assert expected.any()
        torch.testing.assert_close(found, expected)


def test_nothing_is_held_without_a_backward_pass_or_a_trained_router(wrapped):
    moe_lora.set_routing_mode(wrapped, "uniform")
    with torch.no_grad():
        wrapped(torch.randn(2, 6))
    assert routing_state(wrapped).weights == {}
    for module in wrapped.modules():
        if isinstance(module, Router):
            module.requires_grad_(False)
    with wrapped._inside_ddp_forward():
        assert not is_awaited(next(m for m in wrapped.modules() if isinstance(m, Router)))


def test_held_weights_keep_their_value_and_their_gradient():
    weights = torch.tensor([0.5, 0.3, 0.2], requires_grad=True)
    router = LearnedRouter()
    held = hold(router, weights)
    assert torch.equal(held, weights)
    (held * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert weights.grad.tolist() == [1.0, 2.0, 3.0]
    assert router_gradients(router) == [None, None]
