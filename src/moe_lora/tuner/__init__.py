"""The PEFT method: configuration, model, adapted layers and their experts."""

from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.layer import MoELoraConv2d, MoELoraLinear
from moe_lora.tuner.merging import merge, unmerge
from moe_lora.tuner.mixture_product.plain import mixture
from moe_lora.tuner.model import MoELoraModel
from moe_lora.tuner.orthogonality import orthogonality_loss
from moe_lora.tuner.registration import register

__all__ = [
    "MoELoraConfig",
    "MoELoraConv2d",
    "MoELoraLinear",
    "MoELoraModel",
    "merge",
    "mixture",
    "orthogonality_loss",
    "register",
    "unmerge",
]
