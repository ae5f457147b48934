"""Experts and mixtures to and from plain LoRA files."""

from moe_lora.export.fixed_weights import weights_for
from moe_lora.export.from_loras import from_loras
from moe_lora.export.save_and_load_experts import load_experts, save_experts
from moe_lora.export.to_lora import ExportReport, export_lora

__all__ = [
    "ExportReport",
    "export_lora",
    "from_loras",
    "load_experts",
    "save_experts",
    "weights_for",
]
