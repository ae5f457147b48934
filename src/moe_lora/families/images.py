"""Transformers for images that are not similar to FLUX."""

from __future__ import annotations

from moe_lora.families.family import Family
from moe_lora.families.flux import ATTENTION, TEXT_ATTENTION

SD3 = Family(
    classes=("SD3Transformer2DModel",),
    targets=(*ATTENTION, *TEXT_ATTENTION),
    # Here `attn2` is a second self-attention of the image; in other families, cross-attention.
    streams=((r".*\.attn2\..*", "image"),),
    timestep_range=(0.0, 1000.0),
)
Z_IMAGE = Family(
    classes=("ZImageTransformer2DModel",),
    targets=ATTENTION,
    streams=((r"siglip_(refiner|embedder)\..*", "text"),),
    packed=r"all_x_embedder\..*|(cap|siglip)_embedder\..*",
    timestep_range=(1.0, 0.0),
)
LUMINA = Family(
    classes=("Lumina2Transformer2DModel", "LuminaNextDiT2DModel"),
    timestep_range=(1.0, 0.0),
)
AURA_FLOW = Family(classes=("AuraFlowTransformer2DModel",), timestep_range=(0.0, 1.0))
HUNYUAN_DIT = Family(
    classes=("HunyuanDiT2DModel",),
    folded=r"text_embedder\..*",
    timestep_range=(0.0, 1000.0),
)
HUNYUAN_IMAGE = Family(
    classes=("HunyuanImageTransformer2DModel",),
    streams=((r"single_transformer_blocks\..*", "joint_image_first"),),
    timestep_range=(0.0, 1000.0),
)
HIDREAM = Family(
    classes=("HiDreamImageTransformer2DModel",),
    packed=r".*\.experts\..*",
    timestep_range=(0.0, 1000.0),
)
ERNIE_IMAGE = Family(
    classes=("ErnieImageTransformer2DModel",),
    packed=r"layers\.\d+\.mlp\..*|final_linear",
)
GLM_IMAGE = Family(
    classes=("GlmImageTransformer2DModel",),
    streams=((r"glyph_projector\..*", "text"),),
)
KREA2 = Family(
    classes=("Krea2Transformer2DModel",),
    folded=r"text_fusion\.layerwise_blocks\..*",
    timestep_range=(0.0, 1.0),
)
OTHER_IMAGES = Family(
    classes=(
        "CogView3PlusTransformer2DModel",
        "CogView4Transformer2DModel",
        "PixArtTransformer2DModel",
    ),
    timestep_range=(0.0, 1000.0),
)

FAMILIES = (
    SD3,
    Z_IMAGE,
    LUMINA,
    AURA_FLOW,
    HUNYUAN_DIT,
    HUNYUAN_IMAGE,
    HIDREAM,
    ERNIE_IMAGE,
    GLM_IMAGE,
    KREA2,
    OTHER_IMAGES,
)
