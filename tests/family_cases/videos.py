"""Transformers that are called with video latents or with sound."""

from __future__ import annotations

from typing import Any

import torch
from family_cases.case import Case, normal, ones, steps, times

FRAMES, HEIGHT, WIDTH, TEXT = 2, 4, 8, 5
SIZE = {"num_attention_heads": 2, "attention_head_dim": 8}
WAN_SIZE = {"num_attention_heads": 2, "attention_head_dim": 12}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def video(channels: int = 4, frames_first: bool = False, **more: Any) -> Any:
    """Return a maker of latents, text and timesteps; `more` are makers of further arguments."""
    size = (FRAMES, channels) if frames_first else (channels, FRAMES)

    def make(batch: int) -> dict[str, Any]:
        return {
            "hidden_states": normal(batch, *size, HEIGHT, WIDTH),
            "encoder_hidden_states": normal(batch, TEXT, 8),
            "timestep": steps(batch),
            **{name: value(batch) for name, value in more.items()},
        }

    return make


def text_mask(batch: int) -> torch.Tensor:
    return ones(batch, TEXT)


def keep(batch: int) -> torch.Tensor:
    return ones(batch, TEXT).bool()


def pooled(batch: int) -> torch.Tensor:
    return normal(batch, 8)


def ltx(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, FRAMES * HEIGHT * WIDTH, 4),
        "encoder_hidden_states": normal(batch, TEXT, 8),
        "timestep": steps(batch),
        "encoder_attention_mask": text_mask(batch),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
    }


def ltx2(batch: int) -> dict[str, Any]:
    return {
        **ltx(batch),
        "audio_hidden_states": normal(batch, 3, 4),
        "audio_encoder_hidden_states": normal(batch, TEXT, 8),
        "audio_encoder_attention_mask": text_mask(batch),
        "audio_num_frames": 3,
    }


def kandinsky5(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, FRAMES, HEIGHT, WIDTH, 4),
        "encoder_hidden_states": normal(batch, TEXT, 8),
        "timestep": times(batch),
        "pooled_projections": pooled(batch),
        "visual_rope_pos": (torch.arange(FRAMES), torch.arange(2), torch.arange(4)),
        "text_rope_pos": torch.arange(TEXT),
    }


def kandinsky6(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, FRAMES, HEIGHT, WIDTH, 4),
        "encoder_hidden_states": normal(batch, TEXT, 8),
        "pooled_projections": pooled(batch),
        "timestep": times(batch),
        "audio_hidden_states": normal(batch, 3, 4),
    }


def joy_plus(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 8, 4, 1, 2, 2),
        "timestep": steps(batch),
        "encoder_hidden_states": normal(batch, TEXT, 8),
        "encoder_hidden_states_mask": text_mask(batch),
        "shape_list": [[(1, 2, 4)]] * batch,
    }


def latte(batch: int) -> dict[str, Any]:
    return {**video()(batch), "encoder_attention_mask": None}


def vace(batch: int) -> dict[str, Any]:
    return {**video()(batch), "control_hidden_states": normal(batch, 6, FRAMES, HEIGHT, WIDTH)}


def framepack(batch: int) -> dict[str, Any]:
    return {
        **video()(batch),
        "encoder_attention_mask": text_mask(batch),
        "pooled_projections": pooled(batch),
        "image_embeds": normal(batch, 3, 8),
        "indices_latents": torch.arange(1, 1 + FRAMES),
        "latents_clean": normal(batch, 4, 1, HEIGHT, WIDTH),
        "indices_latents_clean": torch.zeros(1),
        "latents_history_2x": normal(batch, 4, 2, HEIGHT, WIDTH),
        "indices_latents_history_2x": torch.zeros(2),
        "latents_history_4x": normal(batch, 4, 4, HEIGHT, WIDTH),
        "indices_latents_history_4x": torch.zeros(4),
    }


def minimax_h3(batch: int) -> dict[str, Any]:
    video_tokens, audio_tokens = 8, 4
    total = video_tokens + audio_tokens + TEXT
    order = torch.arange(total)
    return {
        "hidden_states": normal(batch, video_tokens, 16),
        "audio_hidden_states": normal(batch, audio_tokens, 4),
        "encoder_hidden_states": normal(batch, TEXT, 8),
        "timestep": times(1),
        "timestep_indices": torch.zeros(total, dtype=torch.long),
        "token_tags": torch.tensor([1] * TEXT + [0] * video_tokens + [2] * audio_tokens),
        "position_ids": order[:, None].expand(-1, 3).float(),
        "text_indices": order[:TEXT],
        "video_indices": order[TEXT : TEXT + video_tokens],
        "audio_indices": order[TEXT + video_tokens :],
    }


def sound(channels: int, **more: Any) -> Any:
    def make(batch: int) -> dict[str, Any]:
        return {
            "hidden_states": normal(batch, channels, 6),
            "timestep": times(batch),
            "encoder_hidden_states": normal(batch, TEXT, 8),
            **{name: value(batch) for name, value in more.items()},
        }

    return make


WAN = {
    **WAN_SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 1,
    "rope_max_seq_len": 32,
}
HUNYUAN = {
    **SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 8,
    "rope_axes_dim": (2, 2, 4),
}
COG = {
    **SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 8,
    "num_layers": 1,
    "sample_width": WIDTH,
    "sample_height": HEIGHT,
    "sample_frames": 5,
    "max_text_seq_length": TEXT,
    "use_rotary_positional_embeddings": False,
}
LTX = {
    **SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "num_layers": 1,
    "caption_channels": 8,
}
SANA = {
    **WAN_SIZE,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 12,
    "cross_attention_dim": 24,
    "caption_channels": 8,
    "sample_size": 8,
}
JOY = {
    "in_channels": 4,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "text_dim": 8,
    "num_layers": 1,
    "rope_dim_list": [2, 2, 4],
}
KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 8,
    "in_text_dim2": 8,
    "time_dim": 8,
    "model_dim": 16,
    "ff_dim": 16,
    "num_text_blocks": 1,
    "num_visual_blocks": 1,
    "axes_dims": (4, 2, 2),
}

CASES = [
    Case("WanTransformer3DModel", WAN, video(), targets=ATTENTION),
    Case(
        "WanTransformer3DModel",
        {**WAN, "image_dim": 8, "added_kv_proj_dim": 24},
        # The class counts on exactly 512 text tokens, and takes the rest for the image's.
        video(
            encoder_hidden_states=lambda batch: normal(batch, 512, 8),
            encoder_hidden_states_image=lambda batch: normal(batch, 3, 8),
        ),
        variant="image to video",
        targets=(*ATTENTION, "add_k_proj", "add_v_proj"),
    ),
    Case(
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0], "vace_in_channels": 6},
        vace,
        targets=ATTENTION,
    ),
    Case(
        "ChronoEditTransformer3DModel",
        WAN,
        video(),
        targets=ATTENTION,
    ),
    Case("SkyReelsV2Transformer3DModel", WAN, video(), targets=ATTENTION),
    Case(
        "HeliosTransformer3DModel",
        {
            **{k: v for k, v in WAN.items() if k != "rope_max_seq_len"},
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": False,
            "guidance_cross_attn": False,
            "zero_history_timestep": False,
        },
        video(),
        targets=ATTENTION,
    ),
    Case(
        "AnyFlowTransformer3DModel",
        WAN,
        video(
            frames_first=True,
            timestep=lambda batch: times(batch)[:, None].expand(-1, FRAMES),
            r_timestep=lambda batch: times(batch)[:, None].expand(-1, FRAMES),
        ),
        targets=ATTENTION,
    ),
    Case(
        "CogVideoXTransformer3DModel",
        COG,
        video(frames_first=True),
        targets=ATTENTION,
    ),
    Case(
        "ConsisIDTransformer3DModel",
        COG,
        video(frames_first=True),
        targets=ATTENTION,
    ),
    Case(
        "HunyuanVideoTransformer3DModel",
        {**HUNYUAN, "pooled_projection_dim": 8, "guidance_embeds": False},
        video(encoder_attention_mask=keep, pooled_projections=pooled),
        targets=ATTENTION,
    ),
    Case(
        "HunyuanVideo15Transformer3DModel",
        {
            **{k: v for k, v in HUNYUAN.items() if k != "num_single_layers"},
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "target_size": 16,
        },
        video(
            timestep=times,
            encoder_attention_mask=keep,
            encoder_hidden_states_2=lambda batch: normal(batch, TEXT, 8),
            encoder_attention_mask_2=keep,
            image_embeds=lambda batch: normal(batch, 3, 8),
        ),
        targets=ATTENTION,
    ),
    Case(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **HUNYUAN,
            "pooled_projection_dim": 8,
            "guidance_embeds": False,
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
        },
        framepack,
        targets=ATTENTION,
    ),
    Case(
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN, "rope_axes_dim": (4, 4)},
        lambda batch: {
            **video(encoder_attention_mask=keep, timestep=times)(batch),
            "hidden_states": normal(batch, 4, HEIGHT, WIDTH),
        },
        targets=ATTENTION,
        checkpointing="broken",
    ),
    Case(
        "MotifVideoTransformer3DModel",
        {k: v for k, v in HUNYUAN.items() if k != "num_refiner_layers"},
        video(encoder_attention_mask=text_mask),
        targets=ATTENTION,
    ),
    Case(
        "MochiTransformer3DModel",
        {
            **SIZE,
            "in_channels": 4,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "max_sequence_length": TEXT,
        },
        video(encoder_attention_mask=lambda batch: text_mask(batch).bool()),
        targets=(*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj"),
        idle=r"transformer_blocks\.1\.attn1\.add_q_proj",
    ),
    Case("LTXVideoTransformer3DModel", LTX, ltx, targets=ATTENTION),
    Case(
        "LTX2VideoTransformer3DModel",
        {
            **LTX,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
        },
        ltx2,
        targets=ATTENTION,
    ),
    Case(
        "AllegroTransformer3DModel",
        {
            **WAN_SIZE,
            "num_layers": 1,
            "cross_attention_dim": 24,
            "sample_height": HEIGHT,
            "sample_width": WIDTH,
            "sample_frames": FRAMES,
            "caption_channels": 8,
        },
        lambda batch: {
            **video()(batch),
            "attention_mask": ones(batch, FRAMES, HEIGHT, WIDTH),
            "encoder_attention_mask": text_mask(batch),
            "image_rotary_emb": None,
        },
        targets=ATTENTION,
    ),
    Case(
        "LatteTransformer3DModel",
        {
            **SIZE,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 8,
            "video_length": FRAMES,
        },
        lambda batch: {
            **video()(batch),
            "hidden_states": normal(batch, 4, FRAMES, 8, 8),
        },
        targets=ATTENTION,
    ),
    Case("SanaVideoTransformer3DModel", SANA, video(timestep=steps), targets=ATTENTION),
    Case(
        "CosmosTransformer3DModel",
        {
            **WAN_SIZE,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 8,
            "adaln_lora_dim": 4,
            "max_size": (4, 8, 8),
            "concat_padding_mask": False,
        },
        video(),
        targets=ATTENTION,
    ),
    Case(
        "EasyAnimateTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": WIDTH,
            "sample_height": HEIGHT,
            "num_layers": 1,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            "add_norm_text_encoder": True,
        },
        video(),
        targets=ATTENTION,
    ),
    Case(
        "Kandinsky5Transformer3DModel",
        KANDINSKY,
        kandinsky5,
        targets=("to_query", "to_key", "to_value"),
    ),
    Case(
        "Kandinsky6Transformer3DModel",
        {**KANDINSKY, "visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4},
        kandinsky6,
        targets=("to_query", "to_key", "to_value"),
    ),
    Case(
        "JoyImageEditTransformer3DModel",
        JOY,
        video(),
        targets=("to_q", "to_k", "to_v", "img_attn_qkv", "img_attn_proj"),
    ),
    Case(
        "JoyImageEditPlusTransformer3DModel",
        JOY,
        joy_plus,
        targets=("to_q", "to_k", "to_v", "img_attn_qkv", "img_attn_proj"),
        router={"input_dim": 16, "grid_size": (2, 4)},
    ),
    Case(
        "MiniMaxH3Transformer3DModel",
        {
            **SIZE,
            "hidden_size": 16,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 16,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 8,
            "freq_dim": 8,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 1,
        },
        minimax_h3,
        targets=ATTENTION,
        router={"input_dim": 16, "grid_size": (2, 4)},
        apart=r"time_embedder\..*|transformer_blocks\.\d+\.adaln_proj\..*|norm_out\.linear",
    ),
    Case(
        "StableAudioDiTModel",
        {
            "sample_size": 6,
            "in_channels": 4,
            "num_layers": 1,
            **SIZE,
            "num_key_value_attention_heads": 1,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        sound(
            4,
            global_hidden_states=lambda batch: normal(batch, 1, 8),
            rotary_embedding=lambda batch: (normal(7, 4), normal(7, 4)),
        ),
        targets=ATTENTION,
        router={"grid_size": (2, 3)},
    ),
    Case(
        "StableAudio3DiTModel",
        {
            "io_channels": 4,
            "embed_dim": 16,
            "depth": 1,
            "num_heads": 2,
            "cond_token_dim": 8,
            "global_cond_dim": 8,
            "local_add_cond_dim": 4,
            "timestep_features_dim": 8,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        sound(4, global_hidden_states=pooled),
        targets=("to_q", "to_kv", "to_qkv", "to_out"),
        router={"grid_size": (2, 3)},
    ),
    Case(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 4,
            "condition_dim": 8,
            "num_layers": 1,
            **SIZE,
            "ff_inner_dim": 16,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        sound(4, encoder_hidden_states=lambda batch: normal(batch, 6, 8)),
        targets=ATTENTION,
        router={"grid_size": (2, 3)},
    ),
    Case(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 12,
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 4,
            "encoder_hidden_size": 8,
        },
        lambda batch: {
            "hidden_states": normal(batch, 6, 4),
            "timestep": times(batch),
            "timestep_r": times(batch),
            "encoder_hidden_states": normal(batch, TEXT, 8),
            "context_latents": normal(batch, 6, 8),
        },
        targets=("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "o_proj"),
        router={"input_dim": 4, "grid_size": (2, 3)},
    ),
    Case(
        "LongCatAudioDiTTransformer",
        {
            "dit_dim": 16,
            "dit_depth": 1,
            "dit_heads": 2,
            "dit_text_dim": 8,
            "latent_dim": 4,
            "ff_mult": 2.0,
        },
        lambda batch: {
            "hidden_states": normal(batch, 6, 4),
            "encoder_hidden_states": normal(batch, TEXT, 8),
            "encoder_attention_mask": text_mask(batch).bool(),
            "timestep": times(batch),
            "latent_cond": normal(batch, 6, 4),
        },
        targets=ATTENTION,
        router={"input_dim": 4, "grid_size": (2, 3)},
        checkpointing="none",
    ),
]
