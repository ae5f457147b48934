"""Leave experts out of a mixture, and measure which losses and metrics depend on each of them."""

from __future__ import annotations

from moe_lora.ablation.expert_specialization import Specialization, specialization
from moe_lora.ablation.leave_one_out import ablate_expert

__all__ = ["Specialization", "ablate_expert", "specialization"]
