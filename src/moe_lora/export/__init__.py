"""Experts and mixtures to and from plain LoRA files."""

from moe_lora.export.build import from_loras
from moe_lora.export.experts import load_experts, save_experts
from moe_lora.export.mixture import ExportReport, export_lora
from moe_lora.export.weights import weights_for

__all__ = [
    "ExportReport",
    "export_lora",
    "from_loras",
    "load_experts",
    "save_experts",
    "weights_for",
]
