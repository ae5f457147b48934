"""Losses for object removal: functions, thin Modules, and their combination `RemovalLoss`."""

from __future__ import annotations

from moe_lora.losses.boundary import BoundaryLoss, boundary_loss, default_band_width
from moe_lora.losses.consistency import ConsistencyLoss, consistency_loss, effect_weight
from moe_lora.losses.decoding import LatentDecoder, latent_windows
from moe_lora.losses.detail import DetailLoss, detail_loss
from moe_lora.losses.expert_signals import ExpertSignals
from moe_lora.losses.expert_table import EXPERT_OF_LOSS
from moe_lora.losses.flow_matching import BaseLoss, Weighting, base_loss, sigma_weight
from moe_lora.losses.reduction import Reduction
from moe_lora.losses.removal import RemovalLoss, RemovalLossOutput
from moe_lora.losses.removal_task import compute_removal_task_loss

__all__ = [
    "EXPERT_OF_LOSS",
    "BaseLoss",
    "BoundaryLoss",
    "ConsistencyLoss",
    "DetailLoss",
    "ExpertSignals",
    "LatentDecoder",
    "Reduction",
    "RemovalLoss",
    "RemovalLossOutput",
    "Weighting",
    "base_loss",
    "boundary_loss",
    "compute_removal_task_loss",
    "consistency_loss",
    "default_band_width",
    "detail_loss",
    "effect_weight",
    "latent_windows",
    "sigma_weight",
]
