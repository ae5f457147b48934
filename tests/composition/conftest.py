"""A mixture of convolutions and linear layers, and plain LoRAs of PEFT for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig, Router, RouterInputs

TARGETS = ["conv", "to_q", "to_out"]


class Net(nn.Module):
    """A convolution, and linear layers on its pixels as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.to_q, self.to_out = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = self.conv(hidden_states).flatten(2).mT
        return self.to_out(self.to_q(tokens).tanh())


@moe_lora.register_router("grows_in_tests")
class Growing(Router):
    """Mean of the input, by a linear layer a model's own code would write."""

    def __init__(self, num_experts: int = 3) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(num_experts))

    def logits(self, inputs: RouterInputs) -> Tensor:
        means = inputs.model_inputs["hidden_states"].float().mean((2, 3))
        return torch.cat([head(means) for head in self.heads], -1)

    def add_expert(self, logit: float) -> None:
        head = nn.Linear(3, 1)
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, logit)
        self.heads.append(head)
        self.init_kwargs["num_experts"] = len(self.heads)

    def remove_expert(self, index: int) -> None:
        del self.heads[index]
        self.init_kwargs["num_experts"] = len(self.heads)


def base_net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def make_model() -> Callable[..., PeftModel]:
    def make(**fields: Any) -> PeftModel:
        given = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": TARGETS,
            "expert_names": ("a", "b", "c"),
            "router": "grows_in_tests",
            "init_lora_weights": False,
        }
        base = base_net()
        torch.manual_seed(1)
        return get_peft_model(base, MoELoraConfig(**{**given, **fields})).eval()

    return make


@pytest.fixture
def make_lora(tmp_path: Path) -> Callable[..., tuple[Path, PeftModel]]:
    """Save a plain LoRA of PEFT; return its folder and the model with it."""

    def make(name: str = "lora", **fields: Any) -> tuple[Path, PeftModel]:
        given = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
        base = base_net()
        torch.manual_seed(2)
        model = get_peft_model(base, LoraConfig(**{**given, **fields})).eval()
        model.save_pretrained(tmp_path / name)
        return tmp_path / name, model

    return make


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(3))
