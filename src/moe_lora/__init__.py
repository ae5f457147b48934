"""Mask-aware mixtures of LoRA experts for diffusion models.

Importing the package registers the PEFT method `"MOE_LORA"` and does nothing else.
"""

from moe_lora import flow, losses, masks, metrics, plots, schedules
from moe_lora.config import MoELoraConfig
from moe_lora.export import (
    ExportReport,
    export_lora,
    from_loras,
    load_experts,
    save_experts,
    weights_for,
)
from moe_lora.knockout import knocked_out
from moe_lora.layer import MoELoraConv2d, MoELoraLinear
from moe_lora.losses import RemovalLoss, compute_removal_task_loss
from moe_lora.masks import MaskInfo, extract_mask_info_from_batch
from moe_lora.merging import merge, unmerge
from moe_lora.mixing import mixture
from moe_lora.model import MoELoraModel
from moe_lora.orthogonality import orthogonality_loss
from moe_lora.registration import register
from moe_lora.routing import (
    FixedRouter,
    MaskAwareFeatureExtractor,
    Router,
    RouterInputs,
    RoutingDecision,
    RoutingStats,
    ThreeExpertRemovalRouter,
    TokenRemovalRouter,
    UniformRouter,
    adapted_layers,
    attach_router,
    current_routing,
    entropy_floor_loss,
    load_balancing_loss,
    register_router,
    route,
    routed_checkpoint,
    router_inputs,
    router_names,
    router_z_loss,
    routing_mode_for,
    routing_stats,
    set_router_inputs,
    set_routing_mode,
    teach_experts,
)
from moe_lora.save_and_load import load_adapter, save_adapter
from moe_lora.specialising import Specialisation, specialisation

__version__ = "0.1.0"

__all__ = [
    "ExportReport",
    "FixedRouter",
    "MaskAwareFeatureExtractor",
    "MaskInfo",
    "MoELoraConfig",
    "MoELoraConv2d",
    "MoELoraLinear",
    "MoELoraModel",
    "RemovalLoss",
    "Router",
    "RouterInputs",
    "RoutingDecision",
    "RoutingStats",
    "Specialisation",
    "ThreeExpertRemovalRouter",
    "TokenRemovalRouter",
    "UniformRouter",
    "adapted_layers",
    "attach_router",
    "compute_removal_task_loss",
    "current_routing",
    "entropy_floor_loss",
    "export_lora",
    "extract_mask_info_from_batch",
    "flow",
    "from_loras",
    "knocked_out",
    "load_adapter",
    "load_balancing_loss",
    "load_experts",
    "losses",
    "masks",
    "merge",
    "metrics",
    "mixture",
    "orthogonality_loss",
    "plots",
    "register",
    "register_router",
    "route",
    "routed_checkpoint",
    "router_inputs",
    "router_names",
    "router_z_loss",
    "routing_mode_for",
    "routing_stats",
    "save_adapter",
    "save_experts",
    "schedules",
    "set_router_inputs",
    "set_routing_mode",
    "specialisation",
    "teach_experts",
    "unmerge",
    "weights_for",
]

register()
