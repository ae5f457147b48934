"""Routers, their inputs and decisions, and how their weights reach the adapted layers."""

from moe_lora.routing.auxiliary_losses import (
    entropy_floor_loss,
    load_balancing_loss,
    router_supervision_loss,
    router_z_loss,
)
from moe_lora.routing.calibration import fit_temperature
from moe_lora.routing.control import (
    adapted_layers,
    attach_router,
    current_routing,
    route,
    routed_checkpoint,
    router_inputs,
    routing_mode_for,
    routing_stats,
    set_router_inputs,
    set_routing_mode,
    teach_experts,
)
from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.base import Router, RoutingDecision
from moe_lora.routing.routers.features import MaskAwareFeatureExtractor
from moe_lora.routing.routers.fixed import FixedRouter, UniformRouter
from moe_lora.routing.routers.gating import HINT_BIAS, gate, task_hints
from moe_lora.routing.routers.mask_aware import MaskAwareRouter
from moe_lora.routing.routers.registry import register_router, router_names
from moe_lora.routing.routers.surroundings import SurroundingsRouter
from moe_lora.routing.routers.three_expert_removal import ThreeExpertRemovalRouter
from moe_lora.routing.routers.token_removal import TokenRemovalRouter
from moe_lora.routing.statistics import RoutingStats

__all__ = [
    "HINT_BIAS",
    "FixedRouter",
    "MaskAwareFeatureExtractor",
    "MaskAwareRouter",
    "Router",
    "RouterInputs",
    "RoutingDecision",
    "RoutingStats",
    "SurroundingsRouter",
    "ThreeExpertRemovalRouter",
    "TokenRemovalRouter",
    "UniformRouter",
    "adapted_layers",
    "attach_router",
    "current_routing",
    "entropy_floor_loss",
    "fit_temperature",
    "gate",
    "load_balancing_loss",
    "register_router",
    "route",
    "routed_checkpoint",
    "router_inputs",
    "router_names",
    "router_supervision_loss",
    "router_z_loss",
    "routing_mode_for",
    "routing_stats",
    "set_router_inputs",
    "set_routing_mode",
    "task_hints",
    "teach_experts",
]
