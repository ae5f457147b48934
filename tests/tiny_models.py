"""Builders of tiny models of the real classes, with the same weights at each call.

Diffusers is imported by the builders that need it: most tests do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxFillPipeline, FluxTransformer2DModel

TEXT_PARTS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class MLP(nn.Module):
    """Linear layers that take `(B, D)` and `(B, T, D)` alike."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, 10)
        self.second = nn.Linear(10, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()))


class OneLinear(nn.Module):
    """A linear layer whose input has the name that diffusers gives to tokens."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear(hidden_states)


def tiny_flux(
    in_channels: int = 384, *, guidance: bool = False, layers: int = 1, **changes: Any
) -> FluxTransformer2DModel:
    """Build the transformer of FLUX.1 Fill or, with 64 channels, of FLUX.1.

    Args:
        in_channels: Channels of a token.
        guidance: Embed the guidance scale.
        layers: Double blocks, and as many single blocks.
        changes: Fields of the config that differ from the ones here.
    """
    from diffusers import FluxTransformer2DModel

    config: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": 64,
        "num_layers": layers,
        "num_single_layers": layers,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": guidance,
    }
    torch.manual_seed(0)
    return FluxTransformer2DModel(**config | changes)


def flux_inputs(
    batch: int = 2, rows: int = 4, columns: int = 6, in_channels: int = 384, text: int = 5
) -> dict[str, Tensor]:
    """Draw a call of `tiny_flux`, whose masks have another share in each sample."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = normal(batch, rows * columns, in_channels)
    if in_channels == 384:
        tokens = torch.rand(batch, rows * columns, 1, generator=generator)
        share = torch.linspace(0.2, 0.8, batch).view(-1, 1, 1)
        hidden[..., 128:] = (tokens < share).float()
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": normal(batch, text, 16),
        "pooled_projections": normal(batch, 16),
        "timestep": torch.rand(batch, generator=generator),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def tiny_vae(
    latent_channels: int = 16,
    *,
    block_out_channels: tuple[int, ...] = (8, 8, 8, 8),
    **changes: Any,
) -> AutoencoderKL:
    """Build the VAE of FLUX.1 or, with 4 latent channels, of Stable Diffusion.

    Args:
        latent_channels: Channels of the latents. With 4, a 1x1 convolution precedes and follows
            the latents.
        block_out_channels: Channels of each block. Each block but one halves the image's size.
        changes: Fields of the config that differ from the ones here.
    """
    from diffusers import AutoencoderKL

    blocks = len(block_out_channels)
    config: dict[str, Any] = {
        "latent_channels": latent_channels,
        "block_out_channels": block_out_channels,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "layers_per_block": 1,
        "norm_num_groups": block_out_channels[0] // 2,
        "use_quant_conv": latent_channels == 4,
        "use_post_quant_conv": latent_channels == 4,
        "scaling_factor": 0.36,
        "shift_factor": 0.12,
    }
    torch.manual_seed(0)
    return AutoencoderKL(**config | changes)


def two_block_vae(**changes: Any) -> AutoencoderKL:
    """Build a VAE of 4 latent channels, whose latents have half the image's height and width."""
    return tiny_vae(4, block_out_channels=(4, 8), **changes)


def tiny_flux_fill(**changes: Any) -> FluxFillPipeline:
    """Build the pipeline of FLUX.1 Fill without text encoders.

    Args:
        changes: Parts that differ from `tiny_flux`, `tiny_vae`, and a scheduler by default.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline

    parts = dict.fromkeys(TEXT_PARTS) | changes
    if "transformer" not in parts:
        parts["transformer"] = tiny_flux(guidance=True)
    if "vae" not in parts:
        parts["vae"] = tiny_vae()
    parts.setdefault("scheduler", FlowMatchEulerDiscreteScheduler())
    pipe = FluxFillPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
