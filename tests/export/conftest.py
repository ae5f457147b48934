"""Stock pipelines around tiny models, and mixtures whose weights and ranks are of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import get_peft_model
from tiny_models import tiny_flux_fill
from torch import Tensor, nn

from moe_lora import MoELoraConfig


@pytest.fixture
def mixed_config() -> Callable[..., MoELoraConfig]:
    """Make a config with alpha other than r, and with ranks and alphas of their own."""

    def make(**fields: Any) -> MoELoraConfig:
        given = {
            "r": 4,
            "lora_alpha": 10,
            "rank_pattern": {"to_q": 2},
            "init_lora_weights": False,
        }
        return MoELoraConfig(**{**given, **fields})

    return make


@pytest.fixture
def flux(make_flux, flux_targets, mixed_config) -> nn.Module:
    config = mixed_config(
        target_modules=flux_targets,
        alpha_pattern={"proj_mlp": 3},
        router="three_expert_removal",
    )
    return get_peft_model(make_flux(), config).eval()


@pytest.fixture
def load_flux(make_flux) -> Callable[..., nn.Module]:
    """Load a LoRA with the stock pipeline and return its transformer."""

    def load(path: Any, **kwargs: Any) -> nn.Module:
        pipe = tiny_flux_fill(transformer=make_flux(**kwargs).eval(), vae=None)
        pipe.load_lora_weights(path)
        return pipe.transformer

    return load


def tiny_unet(in_channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return unet.eval()


@pytest.fixture
def make_unet() -> Callable[..., nn.Module]:
    return tiny_unet


@pytest.fixture
def unet_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=generator),
    }


@pytest.fixture
def load_unet() -> Callable[..., nn.Module]:
    """Load a LoRA with the stock pipeline and return its UNet."""

    def load(path: Any) -> nn.Module:
        scheduler = EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading")
        pipe = StableDiffusionPipeline(
            unet=tiny_unet(),
            scheduler=scheduler,
            requires_safety_checker=False,
            **dict.fromkeys(
                ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
            ),
        )
        pipe.load_lora_weights(path)
        return pipe.unet

    return load
