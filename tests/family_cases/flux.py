"""FLUX and the models built after it: packed image tokens with numbered positions."""

from __future__ import annotations

from typing import Any

import torch
from family_cases.case import Case, grid_ids, normal, ones, times

ROWS, COLUMNS, TEXT = 2, 4, 5
SIZE = {"num_attention_heads": 2, "attention_head_dim": 8}
BLOCKS = {"num_layers": 1, "num_single_layers": 1, **SIZE}
FLUX = {**BLOCKS, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4)}
IMAGE = ROWS * COLUMNS


def packed(channels: int, ids: int = 3, references: int = 0) -> Any:
    """Return a maker of FLUX's usual arguments."""

    def make(batch: int) -> dict[str, Any]:
        positions = [grid_ids(ROWS, COLUMNS, ids)]
        positions += [grid_ids(ROWS, 2, ids, first=n + 1) for n in range(references)]
        tokens = sum(len(part) for part in positions)
        return {
            "hidden_states": normal(batch, tokens, channels),
            "encoder_hidden_states": normal(batch, TEXT, 8),
            "timestep": times(batch),
            "img_ids": torch.cat(positions),
            "txt_ids": torch.zeros(TEXT, ids),
        }

    return make


def with_pooled(make: Any, **more: Any) -> Any:
    return lambda batch: {**make(batch), "pooled_projections": normal(batch, 8), **more}


def fill(batch: int) -> dict[str, Any]:
    arguments = with_pooled(packed(384))(batch)
    covered = torch.rand(batch, IMAGE, 1) < torch.linspace(0.3, 0.7, batch).view(-1, 1, 1)
    arguments["hidden_states"][..., 128:] = covered.float()
    return arguments


def guided(make: Any) -> Any:
    return lambda batch: {**make(batch), "guidance": torch.full((batch,), 3.5)}


def flux3(references: bool) -> Any:
    def make(batch: int) -> dict[str, Any]:
        arguments = packed(8, 4)(batch)
        if references:
            arguments["image_cond_hidden_states"] = normal(batch, ROWS * 2, 8)
            arguments["image_cond_ids"] = grid_ids(ROWS, 2, 4, first=10)
        return arguments

    return make


def fibo(batch: int) -> dict[str, Any]:
    layers = [normal(batch, TEXT, 8) for _ in range(2)]
    return {**packed(8)(batch), "text_encoder_layers": layers}


def qwen(*shapes: tuple[int, int, int], **more: Any) -> Any:
    def make(batch: int) -> dict[str, Any]:
        tokens = sum(f * h * w for f, h, w in shapes)
        return {
            "hidden_states": normal(batch, tokens, 8),
            "encoder_hidden_states": normal(batch, TEXT, 8),
            "encoder_hidden_states_mask": ones(batch, TEXT).long(),
            "timestep": times(batch),
            "img_shapes": [list(shapes)] * batch,
            **more,
        }

    return make


def qwen21(batch: int) -> dict[str, Any]:
    slots = torch.zeros(batch, TEXT + IMAGE // 4, dtype=torch.bool)
    slots[:, TEXT:] = True
    return {
        "hidden_states": normal(batch, IMAGE, 8),
        "encoder_hidden_states": normal(batch, TEXT, 8),
        "timestep": times(batch),
        "img_shapes": [[(1, ROWS, COLUMNS)]] * batch,
        "img_mask": slots,
    }


QWEN = {"in_channels": 8, "out_channels": 2, "num_layers": 2, **SIZE, "joint_attention_dim": 8}
QWEN |= {"axes_dims_rope": (2, 2, 4)}
FLUX2 = {**BLOCKS, "in_channels": 8, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 2, 2)}

CASES = [
    Case(
        "FluxTransformer2DModel",
        {**FLUX, "in_channels": 8, "pooled_projection_dim": 8, "guidance_embeds": True},
        guided(with_pooled(packed(8))),
    ),
    Case(
        "FluxTransformer2DModel",
        {**FLUX, "in_channels": 384, "out_channels": 64, "pooled_projection_dim": 8},
        fill,
        variant="Fill",
    ),
    Case(
        "FluxTransformer2DModel",
        {**FLUX, "in_channels": 8, "pooled_projection_dim": 8},
        with_pooled(packed(8, references=1)),
        variant="Kontext",
    ),
    Case(
        "Flux2Transformer2DModel",
        {**FLUX2, "timestep_guidance_channels": 8},
        guided(packed(8, 4)),
    ),
    Case(
        "Flux2Transformer2DModel",
        {**FLUX2, "timestep_guidance_channels": 8, "guidance_embeds": False},
        packed(8, 4, references=2),
        variant="with references",
    ),
    Case(
        "Flux3Transformer2DModel",
        {**FLUX2, "cond_in_channels": 8, "timestep_channels": 8},
        flux3(references=False),
        idle=r"mode_blocks\.image_cond\..*",
    ),
    Case(
        "Flux3Transformer2DModel",
        {**FLUX2, "cond_in_channels": 8, "timestep_channels": 8},
        flux3(references=True),
        variant="with references",
    ),
    Case("QwenImageTransformer2DModel", QWEN, qwen((1, ROWS, COLUMNS))),
    Case(
        "QwenImageTransformer2DModel",
        QWEN,
        qwen((1, ROWS, COLUMNS), (1, ROWS, 2)),
        variant="Edit",
    ),
    Case(
        "QwenImageTransformer2DModel",
        {**QWEN, "zero_cond_t": True},
        qwen((1, ROWS, COLUMNS), (1, ROWS, 2)),
        variant="Edit 2511",
        apart=r"time_text_embed\..*|.*\.img_mod\..*",
    ),
    Case(
        "QwenImageTransformer2DModel",
        {**QWEN, "use_additional_t_cond": True, "use_layer3d_rope": True},
        lambda batch: {
            **qwen((1, ROWS, COLUMNS), (1, ROWS, COLUMNS))(batch),
            "additional_t_cond": torch.zeros(batch, dtype=torch.long),
        },
        variant="Layered",
    ),
    Case(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 1,
            **SIZE,
            "context_in_dim": 8,
            "axes_dims_rope": (2, 2, 4),
        },
        qwen21,
        targets=("to_q", "to_k", "to_v", "to_out.0"),
        apart=r"time_text_embed\..*|modulation\..*|norm_out\.linear",
    ),
    Case(
        "ChromaTransformer2DModel",
        {
            **FLUX,
            "in_channels": 8,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 8,
            "approximator_layers": 1,
        },
        packed(8),
        targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"),
    ),
    Case(
        "BriaTransformer2DModel",
        {**FLUX, "in_channels": 8},
        packed(8),
        targets=("to_q", "to_k", "to_v", "to_out.0"),
    ),
    Case(
        "BriaFiboTransformer2DModel",
        {**FLUX, "in_channels": 8, "text_encoder_dim": 8},
        fibo,
        targets=("to_q", "to_k", "to_v", "to_out.0"),
    ),
    Case(
        "LongCatImageTransformer2DModel",
        {**FLUX, "in_channels": 8, "pooled_projection_dim": 8},
        packed(8),
        targets=("to_q", "to_k", "to_v", "to_out.0"),
    ),
    Case(
        "OvisImageTransformer2DModel",
        {**FLUX, "in_channels": 8, "out_channels": 8},
        packed(8),
        targets=("to_q", "to_k", "to_v", "to_out.0"),
    ),
    Case(
        "NucleusMoEImageTransformer2DModel",
        {
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 1,
            **SIZE,
            "joint_attention_dim": 8,
            "axes_dims_rope": (2, 2, 4),
            "moe_enabled": False,
        },
        lambda batch: {
            **qwen((1, ROWS, COLUMNS))(batch),
            "encoder_hidden_states_mask": ones(batch, TEXT).bool(),
        },
        targets=("to_q", "to_k", "to_v", "to_out.0"),
    ),
]
