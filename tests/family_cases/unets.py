"""UNets, plain and for inpainting, of images and of videos."""

from __future__ import annotations

from typing import Any

import torch
from family_cases.case import Case, normal, steps

HEIGHT, WIDTH, TEXT, FRAMES = 8, 16, 5, 2
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
}
BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
BLOCKS_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
SDXL = {
    **UNET,
    **BLOCKS,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}


def plain(channels: int = 4, **more: Any) -> Any:
    def make(batch: int) -> dict[str, Any]:
        return {
            "sample": normal(batch, channels, HEIGHT, WIDTH),
            "timestep": steps(batch),
            "encoder_hidden_states": normal(batch, TEXT, 8),
            **{name: value(batch) for name, value in more.items()},
        }

    return make


def inpainting(**more: Any) -> Any:
    def make(batch: int) -> dict[str, Any]:
        arguments = plain(9, **more)(batch)
        shares = torch.linspace(0.3, 0.7, batch).view(-1, 1, 1)
        arguments["sample"][:, 4] = (torch.rand(batch, HEIGHT, WIDTH) < shares).float()
        return arguments

    return make


def added(batch: int) -> dict[str, Any]:
    return {"text_embeds": normal(batch, 8), "time_ids": normal(batch, 6)}


def video(channels: int = 4, frames_first: bool = False, **more: Any) -> Any:
    size = (FRAMES, channels) if frames_first else (channels, FRAMES)

    def make(batch: int) -> dict[str, Any]:
        return {**plain(**more)(batch), "sample": normal(batch, *size, HEIGHT, WIDTH)}

    return make


CASES = [
    Case("UNet2DConditionModel", {**UNET, **BLOCKS}, plain(), variant="SD 1.5"),
    Case(
        "UNet2DConditionModel",
        {**UNET, **BLOCKS, "in_channels": 9},
        inpainting(),
        variant="SD 1.5 inpainting",
    ),
    Case("UNet2DConditionModel", SDXL, plain(added_cond_kwargs=added), variant="SDXL"),
    Case(
        "UNet2DConditionModel",
        {**SDXL, "in_channels": 9},
        inpainting(added_cond_kwargs=added),
        variant="SDXL inpainting",
    ),
    Case(
        "UNet2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        lambda batch: {"sample": normal(batch, 4, HEIGHT, WIDTH), "timestep": steps(batch)},
        targets=ATTENTION,
    ),
    Case(
        "UNet3DConditionModel",
        {**UNET, **BLOCKS_3D},
        video(),
        targets=ATTENTION,
        checkpointing="none",
    ),
    Case(
        "UNetMotionModel",
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        },
        lambda batch: {
            **video()(batch),
            "encoder_hidden_states": normal(batch * FRAMES, TEXT, 8),
        },
        targets=ATTENTION,
    ),
    Case(
        "UNetSpatioTemporalConditionModel",
        {
            "sample_size": 8,
            "in_channels": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 8,
            "num_attention_heads": (2, 2),
            "num_frames": FRAMES,
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12,
            "down_block_types": (
                "CrossAttnDownBlockSpatioTemporal",
                "DownBlockSpatioTemporal",
            ),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        },
        lambda batch: {
            **video(8, frames_first=True)(batch),
            "encoder_hidden_states": normal(batch, 1, 8),
            "added_time_ids": normal(batch, 3),
        },
        targets=ATTENTION,
    ),
    Case(
        "I2VGenXLUNet",
        {
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            **BLOCKS_3D,
        },
        lambda batch: {
            **video()(batch),
            "fps": steps(batch),
            "image_latents": normal(batch, 4, FRAMES, HEIGHT, WIDTH),
            "image_embeddings": normal(batch, 8),
        },
        targets=ATTENTION,
        checkpointing="none",
    ),
    Case(
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 16),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 8,
            "clip_text_pooled_in_channels": 8,
            "clip_image_in_channels": 8,
            "clip_seq": 2,
        },
        lambda batch: {
            "sample": normal(batch, 4, HEIGHT, WIDTH),
            "timestep_ratio": torch.rand(batch),
            "clip_text_pooled": normal(batch, 1, 8),
            "clip_text": normal(batch, TEXT, 8),
            "clip_img": normal(batch, 1, 8),
        },
        targets=ATTENTION,
    ),
]
