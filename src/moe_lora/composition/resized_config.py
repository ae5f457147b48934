"""The configuration of an adapter with other experts or ranks."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from moe_lora.export.formats.peft import anchored
from moe_lora.routing.routers.gating import check_gate
from moe_lora.tuner.config import MoELoraConfig
from moe_lora.tuner.experts import MoELoraExperts
from moe_lora.tuner.validation.config_fields import check_fields
from moe_lora.tuner.validation.names import check_expert_names


def with_experts(config: MoELoraConfig, names: Sequence[str]) -> MoELoraConfig:
    """Return a copy of a configuration with other experts.

    Args:
        config: the configuration; it may belong to several models, and does not change.
        names: the experts in order.

    Raises:
        ValueError: for invalid names, no experts, or fewer than `top_k`.
    """
    check_expert_names(names)
    check_fields({"expert_names": tuple(names), "num_experts": len(names)})
    check_gate(config.routing_strategy, config.routing_temperature, config.top_k, len(names))
    changed = copy.copy(config)
    changed.expert_names, changed.num_experts = tuple(names), len(names)
    return changed


def raise_rank(experts: MoELoraExperts, rank: int, use_rslora: bool) -> tuple[int, float]:
    """Return a rank and a `lora_alpha` with exactly the scaling of a layer's experts.

    Args:
        experts: the experts.
        rank: the lowest rank.
        use_rslora: whether the scaling is lora_alpha / sqrt(r).

    Returns:
        The lowest rank for which floating-point division gives the same scaling, and its alpha.
    """
    if rank <= experts.r:
        return experts.r, experts.lora_alpha
    scaling = experts.base_scaling
    while True:
        divisor = math.sqrt(rank) if use_rslora else rank
        alpha = scaling * divisor
        for candidate in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
            if candidate / divisor == scaling:
                return rank, candidate
        rank += 1


def with_ranks(
    config: MoELoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> MoELoraConfig:
    """Return a copy of a configuration with other ranks and alphas of its layers.

    Args:
        config: the configuration.
        ranks: the rank of every adapted layer, by its path in the base model.
        alphas: `lora_alpha` of every adapted layer.
    """
    changed = copy.copy(config)
    changed.r = Counter(ranks.values()).most_common(1)[0][0]
    changed.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    changed.rank_pattern = {anchored(p): r for p, r in ranks.items() if r != changed.r}
    changed.alpha_pattern = {anchored(p): a for p, a in alphas.items() if a != changed.lora_alpha}
    return changed
