"""Five small models and two methods, stock LoRA and ours, that must behave alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig


@moe_lora.register_router("contract")
class LearnedRouter(moe_lora.Router):
    """Weights that are learned but do not depend on the input, so that they can be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([0.5, 0.0, -0.5]))

    def logits(self, inputs: moe_lora.RouterInputs) -> Tensor:
        return self.scores.expand(inputs.batch_size, -1)

    def fixed_weights(self) -> Tensor:
        return self.scores.detach().softmax(-1)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.first = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(2).transpose(1, 2)
        return self.head(self.first(x).tanh().mean(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.to_q(x) @ self.to_k(x).transpose(1, 2) / 8**0.5
        return self.head(self.to_out(scores.softmax(-1) @ self.to_v(x)))


def tiny_unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


@dataclass(frozen=True)
class Case:
    """A base model, its inputs, the layers that adapters adapt, and one more to train whole."""

    build: Callable[[], nn.Module]
    inputs: dict[str, Any]
    targets: list[str]
    saved: str

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def __call__(self, model: nn.Module) -> Tensor:
        out = model(**self.inputs)
        return out if isinstance(out, Tensor) else out[0]


@dataclass(frozen=True)
class Method:
    """Configuration of an adapter of one kind, from the same arguments for all."""

    name: str
    kind: type[PeftConfig]
    fixed: dict[str, Any]
    prefix: str

    def config(self, targets: list[str], **kwargs: Any) -> PeftConfig:
        kwargs = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **self.fixed, **kwargs}
        return self.kind(target_modules=list(targets), **kwargs)

    @property
    def ours(self) -> bool:
        return self.kind is MoELoraConfig

    def break_adapter(self, model: nn.Module) -> None:
        """Write a NaN into the last layer's second matrix."""
        last = [p for name, p in model.named_parameters() if "lora_B" in name][-1]
        with torch.no_grad():
            last.view(-1)[0] = float("nan")


LORA = Method("lora", LoraConfig, {}, "lora_")
UNIFORM = Method("moe", MoELoraConfig, {}, "moe_lora_")
ROUTED = Method("moe-routed", MoELoraConfig, {"router": "contract"}, "moe_lora_")
CASES = ["mlp", "conv", "attention", "flux", "unet"]


@pytest.fixture
def make_case(make_mlp, make_flux, make_flux_inputs, flux_targets) -> Callable[[str], Case]:
    def make(name: str) -> Case:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        if name == "mlp":
            return Case(make_mlp, {"x": normal(2, 3, 6)}, ["first", "second"], "head")
        if name == "conv":
            return Case(ConvNet, {"x": normal(2, 3, 4, 5)}, ["first"], "head")
        if name == "attention":
            return Case(Attention, {"x": normal(2, 5, 8)}, ["to_q", "to_v", "to_out.0"], "head")
        if name == "flux":
            inputs = make_flux_inputs(in_channels=64)
            return Case(lambda: make_flux(64), inputs, flux_targets, "norm_out.linear")
        inputs = {
            "sample": normal(2, 4, 8, 8),
            "timestep": torch.tensor(10),
            "encoder_hidden_states": normal(2, 3, 12),
        }
        return Case(tiny_unet, inputs, ["to_q", "to_v", "to_out.0"], "conv_out")

    return make


@pytest.fixture(params=CASES)
def case(request, make_case) -> Case:
    return make_case(request.param)


@pytest.fixture(params=[LORA, UNIFORM, ROUTED], ids=lambda method: method.name)
def method(request) -> Method:
    return request.param


@pytest.fixture(params=[UNIFORM, ROUTED], ids=lambda method: method.name)
def ours(request) -> Method:
    return request.param


@pytest.fixture
def lora() -> Method:
    return LORA
