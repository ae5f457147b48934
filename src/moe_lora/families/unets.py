"""UNets for images and videos."""

from __future__ import annotations

from moe_lora.families.family import CarriedMask, Family
from moe_lora.families.flux import ATTENTION

# 4 latents | 1 mask | 4 masked-image latents.
_INPAINTING = CarriedMask(9, 4, 5, "latent")

STABLE_DIFFUSION = Family(
    classes=("UNet2DConditionModel",),
    targets=ATTENTION,
    timestep_range=(0.0, 1000.0),
    carried_mask=_INPAINTING,
)
UNCONDITIONAL = Family(classes=("UNet2DModel",), timestep_range=(0.0, 1000.0))
MOTION = Family(
    classes=("UNetMotionModel",),
    folded=r"(down|mid|up)\S*",
    timestep_range=(0.0, 1000.0),
    carried_mask=_INPAINTING,
)
TEXT_TO_VIDEO = Family(
    classes=("UNet3DConditionModel",),
    folded=r"(transformer_in|down|mid|up)\S*",
    timestep_range=(0.0, 1000.0),
)
I2VGEN = Family(
    classes=("I2VGenXLUNet",),
    folded=r"(image_latents_temporal_encoder|transformer_in|down|mid|up)\S*",
    timestep_range=(0.0, 1000.0),
)
STABLE_VIDEO_DIFFUSION = Family(
    classes=("UNetSpatioTemporalConditionModel",),
    folded=r"(down|mid|up)\S*",
    video_axes="frames_first",
)

FAMILIES = (STABLE_DIFFUSION, UNCONDITIONAL, MOTION, TEXT_TO_VIDEO, I2VGEN, STABLE_VIDEO_DIFFUSION)
