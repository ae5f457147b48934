from __future__ import annotations

import pytest
import torch

from moe_lora import RouterInputs
from moe_lora.masks import analyze
from moe_lora.routing import ThreeExpertRemovalRouter
from moe_lora.routing.routers.registry import router_class
from moe_lora.routing.routers.removal import REMOVAL_EXPERTS

GRID, DIM = (6, 8), 5
NAMES = ("token_removal", "three_expert_removal")


def call(timestep):
    mask = torch.zeros(8, 1, 96, 128)
    mask[::2, :, 16:80, 32:112] = 1
    mask[1::2, :, :32, :16] = 1
    return RouterInputs(
        torch.zeros(8, 48, DIM),
        mask_info=analyze(mask),
        timestep=timestep,
        grid_size=GRID,
        timestep_range=(0.0, 1.0),
    )


@pytest.mark.parametrize("router_name", NAMES)
def test_a_time_aware_router_learns_a_target_that_depends_on_time(router_name):
    losses = {}
    sigma = torch.linspace(0, 1, 8)
    target = torch.stack([1 - sigma, sigma, 0 * sigma], -1)  # which no time-blind router can give
    for time_aware in (False, True):
        torch.manual_seed(0)
        router = router_class(router_name)(DIM, time_aware=time_aware)
        router.configure(REMOVAL_EXPERTS).eval()
        inputs = call(sigma)
        optimizer = torch.optim.Adam(router.parameters(), lr=0.03)
        for _ in range(120):
            weights = router(inputs).weights
            weights = weights.mean(1) if weights.ndim == 3 else weights
            loss = (weights - target).square().sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[time_aware] = loss.item()
    assert losses[True] < 0.02
    assert losses[False] > 0.15


@pytest.mark.parametrize("router_name", NAMES)
def test_without_a_timestep_a_time_aware_router_raises(router_name):
    router = router_class(router_name)(DIM, time_aware=True).configure(REMOVAL_EXPERTS)
    with pytest.raises(ValueError, match="called with a timestep"):
        router(call(None))
    assert router_class(router_name)(DIM).configure(REMOVAL_EXPERTS)(call(None)).weights.ndim > 1


def test_a_number_that_is_none_raises():
    for bad in (0, -1, 1.5, True, "auto", "3"):
        with pytest.raises(ValueError, match="`num_layers` to be an integer >= 1"):
            ThreeExpertRemovalRouter(4, num_layers=bad)
