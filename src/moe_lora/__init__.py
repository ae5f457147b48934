"""Mask-aware mixtures of LoRA experts for diffusion models.

Importing the package registers the PEFT method `"MOE_LORA"` and does nothing else. The names here
are those of most training scripts; all others are public in their submodule.
"""

from moe_lora import (
    ablation,
    composition,
    export,
    families,
    flow,
    losses,
    masks,
    metrics,
    planning,
    plots,
    routing,
    schedules,
    tuner,
)
from moe_lora._version import __version__ as __version__
from moe_lora.composition import add_expert, remove_expert, rename_expert, train_only
from moe_lora.export import export_lora, from_loras, load_experts, save_experts
from moe_lora.losses import RemovalLoss, compute_removal_task_loss
from moe_lora.masks import extract_mask_info_from_batch
from moe_lora.routing import (
    MaskAwareFeatureExtractor,
    Router,
    RouterInputs,
    ThreeExpertRemovalRouter,
    attach_router,
    current_routing,
    register_router,
    route,
    router_inputs,
    routing_stats,
    set_router_inputs,
    set_routing_mode,
)
from moe_lora.save_and_load import load_adapter, save_adapter
from moe_lora.tuner import (
    MoELoraConfig,
    MoELoraLinear,
    MoELoraModel,
    merge,
    unmerge,
)
from moe_lora.tuner import (
    register as _register,
)

__all__ = [
    "MaskAwareFeatureExtractor",
    "MoELoraConfig",
    "MoELoraLinear",
    "MoELoraModel",
    "RemovalLoss",
    "Router",
    "RouterInputs",
    "ThreeExpertRemovalRouter",
    "ablation",
    "add_expert",
    "attach_router",
    "composition",
    "compute_removal_task_loss",
    "current_routing",
    "export",
    "export_lora",
    "extract_mask_info_from_batch",
    "families",
    "flow",
    "from_loras",
    "load_adapter",
    "load_experts",
    "losses",
    "masks",
    "merge",
    "metrics",
    "planning",
    "plots",
    "register_router",
    "remove_expert",
    "rename_expert",
    "route",
    "router_inputs",
    "routing",
    "routing_stats",
    "save_adapter",
    "save_experts",
    "schedules",
    "set_router_inputs",
    "set_routing_mode",
    "train_only",
    "tuner",
    "unmerge",
]

_register()
