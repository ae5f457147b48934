"""Transformers for video and audio."""

from __future__ import annotations

from moe_lora.families.family import Family

COUNT_TO_1000 = Family(
    classes=(
        "AllegroTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "LTXVideoTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
    ),
    timestep_range=(0.0, 1000.0),
)
HUNYUAN_VIDEO = Family(
    classes=("HunyuanVideoTransformer3DModel", "MotifVideoTransformer3DModel"),
    streams=((r"single_transformer_blocks\..*", "joint_image_first"),),
    timestep_range=(0.0, 1000.0),
)
HUNYUAN_FRAMEPACK = Family(
    classes=("HunyuanVideoFramepackTransformer3DModel",),
    # Token order: earlier frames, image, text.
    streams=((r"single_transformer_blocks\..*", "image"),),
)
MOCHI = Family(
    classes=("MochiTransformer3DModel",),
    streams=((r"time_embed\.pooler\..*", "text"),),
    timestep_range=(0.0, 1000.0),
)
COG_VIDEO = Family(
    classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    timestep_range=(0.0, 1000.0),
    video_axes="frames_first",
)
ANY_FLOW = Family(
    classes=("AnyFlowTransformer3DModel",),
    folded=r"condition_embedder\.(time_embedder|delta_embedder|time_proj).*",
    video_axes="frames_first",
)
LATTE = Family(
    classes=("LatteTransformer3DModel",),
    folded=r"(temporal_)?transformer_blocks\..*|proj_out",
)
KANDINSKY = Family(
    classes=("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel"),
    video_axes="channels_last",
)
ACE_STEP = Family(
    classes=("AceStepTransformer1DModel",),
    streams=((r"condition_embedder", "text"),),
)

FAMILIES = (
    COUNT_TO_1000,
    HUNYUAN_VIDEO,
    HUNYUAN_FRAMEPACK,
    MOCHI,
    COG_VIDEO,
    ANY_FLOW,
    LATTE,
    KANDINSKY,
    ACE_STEP,
)
