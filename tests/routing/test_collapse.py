"""A router that collapses, and what each remedy makes of it.

Three experts learn one linear map, so that any of them would do. The router starts with a small
preference for the first and learns faster than the experts: the first gets most of the gradient,
is the better expert soon, and is preferred the more.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import OneLinear
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig, Router, RouterInputs
from moe_lora.routing import RoutingStats
from moe_lora.routing.auxiliary_losses import entropy_floor_loss, load_balancing_loss, router_z_loss
from moe_lora.tuner.orthogonality import orthogonality_loss

STEPS = 80


class Preferring(Router):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    def logits(self, inputs: RouterInputs) -> Tensor:
        return self.head(inputs.hidden_states.mean(1))


def batch(change: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and by how much the output of the base layer is wrong there."""
    x = torch.randn(24, 4, 8) + 0.5 * torch.randn(24, 1, 8)
    return x, x @ change


@functools.cache
def train(
    seed: int = 0,
    *,
    balance: float = 0.0,
    z: float = 0.0,
    entropy: float = 0.0,
    orthogonality: float = 0.0,
    uniform_steps: int = 0,
    **config: Any,
) -> tuple[RoutingStats, float]:
    """Train by SGD; return what the router decides in the end, and the experts' overlap."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["linear"]} | config
    model = get_peft_model(OneLinear(8), MoELoraConfig(**settings))
    moe_lora.attach_router(model, Preferring())
    base, change = model.get_base_model().linear.base_layer, torch.randn(8, 8) / 8**0.5
    router = [p for m in model.modules() if isinstance(m, Router) for p in m.parameters()]
    experts = [p for name, p in model.named_parameters() if "experts" in name]
    optimizer = torch.optim.SGD([{"params": experts}, {"params": router, "lr": 3.0}], lr=0.3)
    model.train()
    for step in range(STEPS):
        moe_lora.set_routing_mode(model, "uniform" if step < uniform_steps else "routed")
        x, change_of_output = batch(change)
        loss = (model(x) - base(x) - change_of_output).square().mean()
        decision = moe_lora.current_routing(model)
        if decision is not None:
            loss = loss + balance * load_balancing_loss(decision.weights)
            loss = loss + z * router_z_loss(decision.logits)
            loss = loss + entropy * entropy_floor_loss(decision.weights, 0.5)
        if orthogonality:
            loss = loss + orthogonality * orthogonality_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    stats = moe_lora.routing_stats(model.eval())
    stats.reset()
    with torch.no_grad():
        model(torch.cat([batch(change)[0] for _ in range(4)]))
    return stats, orthogonality_loss(model).item()


def test_without_a_remedy_the_router_collapses_and_says_so():
    stats, _ = train()
    assert stats.mean_weights[0] > 0.93
    warning = stats.collapse_warning()
    assert warning is not None
    assert "removal_expert has 9" in warning
    assert stats.entropy < 0.3


@pytest.mark.parametrize(
    "remedy",
    [
        {"balance": 0.1},
        {"z": 0.3},
        {"entropy": 1.0},
        {"orthogonality": 0.3},
        {"expert_dropout": 0.5},
        {"routing_temperature": 4.0},
        {"uniform_steps": 40},
    ],
    ids=lambda remedy: next(iter(remedy)),
)
def test_each_remedy_keeps_it_from_collapsing(remedy):
    stats, _ = train(**remedy)
    assert max(stats.mean_weights) < 0.85
    assert not stats.is_collapsed()
    assert stats.collapse_warning() is None


def test_the_entropy_floor_holds():
    stats, _ = train(entropy=1.0)
    assert stats.entropy > 0.45


def test_orthogonality_keeps_the_experts_apart():
    assert train(orthogonality=0.3)[1] < 0.15 < 0.3 < train()[1]
