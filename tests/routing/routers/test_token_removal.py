from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import moe_lora
from moe_lora import MoELoraConfig, RouterInputs
from moe_lora.masks import analyze
from moe_lora.routing import TokenRemovalRouter
from moe_lora.routing.routers.removal import REMOVAL_EXPERTS

GRID, DIM = (6, 8), 5


def box(*positions):
    """Return masks of 96 x 128 pixels, each full in rows and columns of tokens."""
    mask = torch.zeros(len(positions), 1, 96, 128)
    for index, (top, bottom, left, right) in enumerate(positions):
        mask[index, :, top * 16 : bottom * 16, left * 16 : right * 16] = 1
    return mask


def call(mask, timestep=None, hidden=None):
    batch = mask.shape[0]
    hidden = torch.randn(batch, 48, DIM) if hidden is None else hidden
    return RouterInputs(
        hidden,
        mask_info=analyze(mask),
        timestep=timestep,
        grid_size=GRID,
        timestep_range=(0.0, 1.0),
    )


def make(**kwargs):
    torch.manual_seed(1)
    return TokenRemovalRouter(DIM, **kwargs).configure(REMOVAL_EXPERTS).eval()


def test_initially_the_position_of_a_token_decides():
    chosen = make()(call(box((1, 5, 2, 7)))).weights.argmax(-1).view(GRID)
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            inside = 1 <= row < 5 and 2 <= column < 7
            near = [
                (row + dy, column + dx)
                for dy in (-1, 0, 1)
                for dx in (-1, 0, 1)
                if 0 <= row + dy < GRID[0] and 0 <= column + dx < GRID[1]
            ]
            on_edge = any((1 <= y < 5 and 2 <= x < 7) != inside for y, x in near)
            expected = 0 if on_edge else 2 if inside else 1
            if on_edge and not inside and sum(1 <= y < 5 and 2 <= x < 7 for y, x in near) == 1:
                continue  # a corner touches a quarter of the token
            assert chosen[row, column] == expected, (row, column)


def test_empty_and_full_masks_have_no_edge():
    weights = make()(call(torch.stack([torch.zeros(1, 96, 128), torch.ones(1, 96, 128)]))).weights
    assert weights.argmax(-1).tolist() == [[1] * 48, [2] * 48]


def test_rows_sum_to_one_and_a_batch_equals_its_samples():
    mask, hidden = box((1, 5, 2, 7), (0, 2, 0, 1), (3, 4, 3, 4)), torch.randn(3, 48, DIM)
    router, sigma = make(time_aware=True), torch.tensor([0.1, 0.5, 0.9])
    nn.init.normal_(router.router[-1].weight)
    together = router(call(mask, sigma, hidden)).weights
    assert together.shape == (3, 48, 3)
    torch.testing.assert_close(together.sum(-1), torch.ones(3, 48))
    for i in range(3):
        one = slice(i, i + 1)
        alone = router(call(mask[one], sigma[one], hidden[one])).weights
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("top_k", [1, 2])
def test_topk_leaves_that_many_in_every_token(top_k):
    router = TokenRemovalRouter(DIM).configure(REMOVAL_EXPERTS, strategy="topk", top_k=top_k)
    weights = router(call(box((1, 5, 2, 7)))).weights
    assert ((weights != 0).sum(-1) == top_k).all()


def test_every_parameter_is_there_at_once_and_learns():
    router = make(time_aware=True)
    parameters = dict(router.named_parameters())
    assert len(parameters) == 9
    weights = router(call(box((1, 5, 2, 7)), torch.tensor([0.3]))).weights
    (weights * torch.randn_like(weights)).sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad.abs().sum() > 0, name


def test_invalid_inputs_raise():
    router = make()
    with pytest.raises(ValueError, match="TokenRemovalRouter needs a mask"):
        router(RouterInputs(torch.zeros(1, 48, DIM), grid_size=GRID))
    with pytest.raises(ValueError, match="`grid_size`"):
        router(RouterInputs(torch.zeros(1, 48, DIM), mask_info=analyze(box((1, 2, 1, 2)))))
    with pytest.raises(ValueError, match=r"\(B, T, input_dim=5\), but got \(1, 48, 7\)"):
        router(call(box((1, 2, 1, 2)), hidden=torch.zeros(1, 48, 7)))
    with pytest.raises(ValueError, match="order of TokenRemovalRouter's logits"):
        router.configure(REMOVAL_EXPERTS[::-1])
    with pytest.raises(ValueError, match="exactly 3 experts for TokenRemovalRouter, but got 2"):
        router.configure(("a", "b"))


def test_it_is_named_saved_loaded_and_trained_in_flux_fill(make_flux, make_flux_inputs, tmp_path):
    config = MoELoraConfig(
        r=2,
        target_modules=["to_q", "add_q_proj", "norm1.linear", "proj_mlp"],
        router="token_removal",
        router_kwargs={"time_aware": True, "hidden_dim": 16},
        init_lora_weights=False,
    )
    model = get_peft_model(make_flux(), config)
    call = make_flux_inputs()
    out = model(**call)[0]
    decision = moe_lora.current_routing(model)
    assert decision.weights.shape == (2, 24, 3)
    out.square().mean().backward()
    for name, parameter in model.named_parameters():
        if "moe_lora_routers" in name:
            assert parameter.grad.abs().sum() > 0, name
    model.eval().save_pretrained(tmp_path)
    kwargs = json.loads((tmp_path / "adapter_config.json").read_text())["router_kwargs"]
    assert kwargs == {"input_dim": 128, "hidden_dim": 16, "time_aware": True}
    loaded = PeftModel.from_pretrained(make_flux(), tmp_path).eval()
    assert torch.equal(loaded(**call)[0], model(**call)[0])
    later = {**call, "timestep": 1 - call["timestep"]}
    router = loaded.base_model.model.moe_router.moe_lora_routers["default"]
    nn.init.normal_(router.router[-1].weight)
    loaded(**call), (first := moe_lora.current_routing(loaded).weights)
    loaded(**later)
    assert not torch.allclose(moe_lora.current_routing(loaded).weights, first)
    with pytest.raises(ValueError, match="TokenRemovalRouter computes them from the input"):
        loaded.merge_adapter()
