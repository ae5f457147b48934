from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
)
from peft import get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.planning import example_call, step_memory

pytestmark = pytest.mark.slow


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = FluxTransformer2DModel(
        in_channels=384,
        out_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0))
    inputs = {
        "hidden_states": torch.rand(2, 256, 384),
        "timestep": torch.full((2,), 0.5),
        "guidance": torch.full((2,), 30.0),
        "pooled_projections": torch.zeros(2, 32),
        "encoder_hidden_states": torch.zeros(2, 8, 64),
        "txt_ids": torch.zeros(8, 3),
        "img_ids": ids,
    }
    return model, inputs


def unet() -> tuple[nn.Module, dict[str, Any]]:
    model = UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    inputs = {
        "sample": torch.rand(2, 4, 32, 32),
        "timestep": torch.full((2,), 500),
        "encoder_hidden_states": torch.zeros(2, 8, 32),
    }
    return model, inputs


def flux2() -> tuple[nn.Module, dict[str, Any]]:
    model = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        axes_dims_rope=(8, 8, 8, 8),
    )
    return model, filled(model)


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    model = QwenImageTransformer2DModel(
        in_channels=32,
        out_channels=8,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    return model, filled(model)


def filled(model: nn.Module) -> dict[str, Any]:
    """Return the example call of a model, with values."""
    call = example_call(model, 256, 256, batch_size=2, text_tokens=8)
    assert call is not None
    return {
        name: torch.rand(value.shape) if isinstance(value, Tensor) else value
        for name, value in call.items()
    }


def allocated(model: nn.Module, inputs: dict[str, Any], weights: Tensor) -> int:
    """Return the most bytes that PyTorch's allocator handed out in a training step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with moe_lora.route(model, weights):
            output = model(**inputs)[0]
        output.float().square().mean().backward()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = peak = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", [flux, unet, flux2, qwen])
def test_the_peak_is_what_the_allocator_hands_out(build: Any, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.requires_grad_(False)
    model.add_adapter(MoELoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    weights = torch.full((2, 3), 1 / 3)
    found = step_memory(model, inputs)
    model(**inputs)[0].mean().backward()  # what is made once, and kept
    model.zero_grad(set_to_none=True)
    assert found.peak == pytest.approx(allocated(model, inputs, weights), rel=0.1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.gradients == 4 * trained


@pytest.mark.parametrize("router", [None, "fixed"])
def test_the_saved_activations_of_one_linear_layer_are_counted_to_the_byte(
    router: str | None,
) -> None:
    model = nn.Sequential(nn.Linear(6, 10, bias=False))
    kwargs = {"weights": [1.0, 0.0, 0.0]} if router else {}
    config = MoELoraConfig(
        r=2, num_experts=3, target_modules=["0"], router=router, router_kwargs=kwargs
    )
    found = step_memory(get_peft_model(model, config), {"input": torch.rand(5, 7, 6)})
    output, hidden, gate = 5 * 7 * 10, 5 * 7 * 6, 5 * 6
    # The gradient of B needs the gated product, that of A the gate, that of the gate the product.
    assert found.saved == 4 * (output + hidden + gate + (hidden if router else 0))


def test_the_model_keeps_its_values_and_may_have_none() -> None:
    model, inputs = flux()
    with torch.device("meta"):
        empty, _ = flux()
    found = []
    for each in (model, empty):
        each.requires_grad_(False)
        each.add_adapter(MoELoraConfig(r=4, target_modules=["to_q"]))
        before = dict(each.named_parameters())
        found.append(step_memory(each, inputs))
        assert all(p is before[name] for name, p in each.named_parameters())
        assert all(p.grad is None for p in each.parameters())
    assert found[0] == found[1]


def test_more_tokens_need_more_and_checkpointing_needs_less() -> None:
    model, inputs = flux()
    model.requires_grad_(False)
    model.add_adapter(MoELoraConfig(r=4, target_modules=["to_q"]))
    model.train()
    whole = step_memory(model, inputs)
    half = {name: v[:1] if v.shape[0] == 2 else v for name, v in inputs.items()}
    assert step_memory(model, half).saved < whole.saved
    model.enable_gradient_checkpointing()
    assert step_memory(model, inputs).peak < whole.peak / 2


def test_a_call_that_reads_values_raises() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * float(x.max())

    model = get_peft_model(Reads(), MoELoraConfig(r=2, target_modules=["linear"]))
    with pytest.raises(ValueError, match="reads no value of its inputs"):
        step_memory(model, {"x": torch.rand(2, 4)})


def test_a_model_without_an_adapter_raises() -> None:
    with pytest.raises(ValueError, match="Expected a model with a moe_lora adapter"):
        step_memory(nn.Linear(2, 2), {"input": torch.rand(1, 2)})
