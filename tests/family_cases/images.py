"""Transformers that are called with image latents."""

from __future__ import annotations

from typing import Any

import torch
from family_cases.case import Case, normal, ones, steps, times

HEIGHT, WIDTH, TEXT = 4, 8, 5
SIZE = {"num_attention_heads": 2, "attention_head_dim": 8}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def image(**more: Any) -> Any:
    """Return a maker of latents, text and timesteps; `more` are makers of further arguments."""

    def make(batch: int) -> dict[str, Any]:
        return {
            "hidden_states": normal(batch, 4, HEIGHT, WIDTH),
            "encoder_hidden_states": normal(batch, TEXT, 8),
            "timestep": steps(batch),
            **{name: value(batch) for name, value in more.items()},
        }

    return make


def z_image(batch: int) -> dict[str, Any]:
    return {
        "x": [normal(4, 1, HEIGHT, WIDTH) for _ in range(batch)],
        "t": times(batch),
        "cap_feats": [normal(TEXT, 8) for _ in range(batch)],
    }


def z_image_omni(batch: int) -> dict[str, Any]:
    size = (4, 1, HEIGHT, WIDTH)
    return {
        "x": [[normal(*size), normal(*size)] for _ in range(batch)],
        "t": times(batch),
        "cap_feats": [[normal(TEXT, 8), normal(TEXT, 8), normal(2, 8)] for _ in range(batch)],
        "siglip_feats": [[normal(2, 4, 8), None] for _ in range(batch)],
        "image_noise_mask": [[0, 1]] * batch,
    }


def pair(first: int, second: int) -> Any:
    return lambda batch: torch.tensor([[float(first), float(second)]]).expand(batch, 2)


def hidream(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, HEIGHT, HEIGHT),
        "timesteps": steps(batch),
        "encoder_hidden_states_t5": normal(batch, TEXT, 8),
        "encoder_hidden_states_llama3": [normal(batch, TEXT, 8) for _ in range(2)],
        "pooled_embeds": normal(batch, 8),
    }


def hunyuan_dit(batch: int) -> dict[str, Any]:
    return {
        **image(encoder_hidden_states_t5=lambda b: normal(b, TEXT, 8))(batch),
        "timestep": times(batch),
        "text_embedding_mask": ones(batch, TEXT),
        "text_embedding_mask_t5": ones(batch, TEXT),
        "image_meta_size": normal(batch, 6),
        "style": torch.zeros(batch, dtype=torch.long),
        "image_rotary_emb": (normal(HEIGHT * WIDTH // 4, 8), normal(HEIGHT * WIDTH // 4, 8)),
    }


def omnigen(batch: int) -> dict[str, Any]:
    tokens = TEXT + 1 + HEIGHT * WIDTH // 4
    return {
        "hidden_states": normal(batch, 4, HEIGHT, WIDTH),
        "timestep": times(batch),
        "input_ids": torch.randint(0, 10, (batch, TEXT)),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": ones(batch, tokens, tokens),
        "position_ids": torch.arange(tokens)[None].expand(batch, -1),
    }


def ernie(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 4, HEIGHT, WIDTH),
        "timestep": steps(batch).float(),
        "text_bth": normal(batch, TEXT, 8),
        "text_lens": torch.full((batch,), TEXT),
    }


def glm(batch: int) -> dict[str, Any]:
    return {
        **image(target_size=pair(32, 64), crop_coords=pair(0, 0))(batch),
        "prior_token_id": torch.randint(0, 16, (batch, HEIGHT * WIDTH // 4)),
        "prior_token_drop": torch.zeros(batch, dtype=torch.bool),
    }


def krea(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 8, 8),
        "encoder_hidden_states": normal(batch, TEXT, 2, 8),
        "timestep": times(batch),
        "position_ids": torch.arange(TEXT + 8)[:, None].expand(-1, 3).float(),
    }


def ideogram(batch: int) -> dict[str, Any]:
    tokens = TEXT + 8
    kinds = torch.tensor([3] * TEXT + [2] * 8).expand(batch, -1)
    return {
        "hidden_states": normal(batch, tokens, 8),
        "timestep": times(batch),
        "encoder_hidden_states": normal(batch, tokens, 8),
        "position_ids": torch.arange(tokens)[None, :, None].expand(batch, -1, 3),
        "segment_ids": torch.zeros(batch, tokens, dtype=torch.long),
        "indicator": kinds,
    }


def lumina_next(batch: int) -> dict[str, Any]:
    return {
        **image(encoder_mask=lambda b: ones(b, TEXT))(batch),
        "timestep": times(batch),
        "image_rotary_emb": torch.polar(ones(8, 8, 4), normal(8, 8, 4)),
        "cross_attention_kwargs": {},
    }


def prior(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 8),
        "timestep": steps(batch),
        "proj_embedding": normal(batch, 8),
        "encoder_hidden_states": normal(batch, TEXT, 8),
    }


SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    **SIZE,
    "joint_attention_dim": 8,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
}
POOLED = image(pooled_projections=lambda batch: normal(batch, 8))
Z_IMAGE = {
    "in_channels": 4,
    "dim": 16,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 8,
    "axes_dims": (2, 2, 4),
    "axes_lens": (256, 16, 16),
}
DIT = {"num_layers": 1, **SIZE, "in_channels": 4, "sample_size": 8}
COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    **SIZE,
    "text_embed_dim": 8,
    "time_embed_dim": 8,
    "condition_dim": 4,
}
SIZES = {"target_size": pair(32, 64), "crop_coords": pair(0, 0)}

# The last block's text tokens are not used any more.
LAST_TEXT_QUERY = r"transformer_blocks\.1\.attn\.add_q_proj"

CASES = [
    Case(
        "SD3Transformer2DModel",
        SD3,
        POOLED,
        idle=LAST_TEXT_QUERY,
    ),
    Case(
        "SD3Transformer2DModel",
        {**SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        POOLED,
        variant="3.5",
        idle=LAST_TEXT_QUERY,
    ),
    Case("ZImageTransformer2DModel", Z_IMAGE, z_image),
    Case(
        "ZImageTransformer2DModel",
        {**Z_IMAGE, "siglip_feat_dim": 8},
        z_image_omni,
        variant="Omni",
    ),
    Case(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            **SIZE,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        image(timestep=times),
        targets=ATTENTION,
    ),
    Case(
        "PixArtTransformer2DModel",
        {**DIT, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 8},
        lambda batch: {
            **image()(batch),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        targets=ATTENTION,
    ),
    Case(
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            **SIZE,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "sample_size": 8,
        },
        image(),
        targets=ATTENTION,
    ),
    Case(
        "DiTTransformer2DModel",
        {**DIT, "out_channels": 8, "num_embeds_ada_norm": 10},
        lambda batch: {
            "hidden_states": normal(batch, 4, 8, 8),
            "timestep": steps(batch),
            "class_labels": steps(batch),
        },
        targets=ATTENTION,
    ),
    Case(
        "HunyuanDiT2DModel",
        {
            **SIZE,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 16,
            "num_layers": 1,
            "mlp_ratio": 2.0,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 8,
            "text_len": TEXT,
            "text_len_t5": TEXT,
        },
        hunyuan_dit,
        targets=ATTENTION,
        checkpointing="none",
    ),
    Case(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            **SIZE,
            "caption_channels": [8, 8],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (2, 2, 4),
            "max_resolution": (4, 4),
            "llama_layers": [0, 1],
        },
        hidream,
        targets=("to_q", "to_k", "to_v", "to_out"),
    ),
    Case(
        "CogView3PlusTransformer2DModel",
        {**COGVIEW, "pos_embed_max_size": 8, "sample_size": 8},
        image(original_size=pair(32, 64), **SIZES),
        targets=ATTENTION,
    ),
    Case(
        "CogView4Transformer2DModel",
        {**COGVIEW, "sample_size": 8, "rope_axes_dim": (8, 8)},
        image(original_size=pair(32, 64), **SIZES),
        targets=ATTENTION,
    ),
    Case(
        "GlmImageTransformer2DModel",
        {**COGVIEW, "prior_vq_quantizer_codebook_size": 16},
        glm,
        targets=ATTENTION,
    ),
    Case(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (2, 2, 4),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 8,
        },
        image(encoder_attention_mask=lambda batch: ones(batch, TEXT).bool(), timestep=times),
        targets=ATTENTION,
    ),
    Case(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "cross_attention_dim": 8,
        },
        lumina_next,
        targets=ATTENTION,
        checkpointing="none",
    ),
    Case(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "num_layers": 1,
            "pad_token_id": 0,
            "vocab_size": 16,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "rope_scaling": {"long_factor": [1] * 4, "short_factor": [1] * 4},
            "pos_embed_max_size": 8,
            "time_step_dim": 8,
        },
        omnigen,
        targets=ATTENTION,
    ),
    Case(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 8,
            "rope_axes_dim": (2, 2, 4),
        },
        ernie,
        targets=ATTENTION,
    ),
    Case(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 8,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 1,
            "axes_dim": [4, 4],
        },
        image(timestep=times),
        targets=("img_qkv_proj", "txt_kv_proj", "to_out.0"),
    ),
    Case(
        "Krea2Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 1,
            **SIZE,
            "num_key_value_heads": 1,
            "intermediate_size": 16,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 8,
            "num_text_layers": 2,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 8,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (2, 2, 4),
        },
        krea,
        targets=("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"),
        router={"grid_size": (2, 4)},
    ),
    Case(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 1,
            **SIZE,
            "intermediate_size": 16,
            "adaln_dim": 8,
            "llm_features_dim": 8,
            "mrope_section": (2, 1, 1),
        },
        ideogram,
        targets=("qkv", "to_q", "to_k", "to_v", "to_out.0"),
        router={"grid_size": (1, TEXT + 8)},
    ),
    Case(
        "Transformer2DModel",
        {**DIT, "norm_num_groups": 2, "cross_attention_dim": 8},
        lambda batch: {
            "hidden_states": normal(batch, 4, HEIGHT, WIDTH),
            "encoder_hidden_states": normal(batch, TEXT, 8),
        },
        targets=ATTENTION,
    ),
    Case(
        "PriorTransformer",
        {**SIZE, "num_layers": 1, "embedding_dim": 8, "num_embeddings": TEXT},
        prior,
        targets=ATTENTION,
        router={"input_dim": 8, "grid_size": (1, 1)},
        checkpointing="none",
    ),
]
