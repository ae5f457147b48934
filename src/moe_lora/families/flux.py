"""FLUX and similar models: packed image tokens with numbered positions."""

from __future__ import annotations

from moe_lora.families.family import CarriedMask, Family

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_ATTENTION = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

FLUX = Family(
    classes=("FluxTransformer2DModel",),
    targets=(
        *ATTENTION,
        *TEXT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    ),
    timestep_range=(0.0, 1.0),
    # FLUX Fill: 64 noisy | 64 masked image | 256 mask.
    carried_mask=CarriedMask(384, 128, 384, "flux_fill"),
)
FLUX2 = Family(
    classes=("Flux2Transformer2DModel",),
    # A regex: `attn.to_out` is a list of modules in the blocks with two streams.
    targets=(
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
    timestep_range=(0.0, 1.0),
)
FLUX3 = Family(
    classes=("Flux3Transformer2DModel",),
    targets=ATTENTION,
    streams=(
        # Tokens of reference images use the mean weights, like text.
        (r"txt_mode_blocks\..*|.*_modulations\.(txt|image_cond)\..*", "text"),
        (r"mode_blocks\.image_cond\..*|x_embedders\.image_cond", "text"),
        # Text, image, references.
        (r"single_transformer_blocks\..*", "image"),
    ),
    timestep_range=(0.0, 1.0),
)
QWEN_IMAGE = Family(
    classes=("QwenImageTransformer2DModel",),
    targets=ATTENTION,
    timestep_range=(0.0, 1.0),
)
QWEN_IMAGE_21 = Family(
    classes=("QwenImage21Transformer2DModel",),
    timestep_range=(0.0, 1.0),
    references="first",
)
LIKE_FLUX = Family(
    classes=(
        "BriaFibo2Transformer2DModel",
        "ChromaTransformer2DModel",
        "LongCatImageTransformer2DModel",
        "NucleusMoEImageTransformer2DModel",
        "OvisImageTransformer2DModel",
    ),
    timestep_range=(0.0, 1.0),
)
BRIA = Family(
    classes=("BriaFiboTransformer2DModel", "BriaTransformer2DModel"),
    timestep_range=(0.0, 1000.0),
)

FAMILIES = (FLUX, FLUX2, FLUX3, QWEN_IMAGE, QWEN_IMAGE_21, LIKE_FLUX, BRIA)
