"""Auxiliary losses that keep a router balanced and its logits small."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(weights: Tensor) -> Tensor:
    """Measure how unevenly the experts are used.

    E · Σ_e f_e · P_e, where f_e is the share of samples (or tokens) whose largest weight is expert
    e and P_e the mean weight of expert e. It is 1 at perfect balance and `E` when every weight is
    on one expert. The gradient flows through P only; f counts.

    Args:
        weights: `(B, E)` or `(B, T, E)` routing weights, rows sum to 1.

    Returns:
        A scalar in [0, E], the mean over samples and tokens.

    Raises:
        ValueError: when `weights` has another number of dimensions.

    Source:
        Fedus et al., Switch Transformers, arXiv:2101.03961, eq. 4 to 6 (without its α).

    Example:
        >>> load_balancing_loss(torch.tensor([[0.7, 0.3], [0.6, 0.4]]))
        tensor(1.3000)
    """
    _check_experts_last("weights", weights)
    rows = weights.flatten(0, -2)
    num_experts = rows.shape[-1]
    experts = torch.arange(num_experts, device=rows.device)
    used = (rows.detach().argmax(-1, keepdim=True) == experts).to(rows.dtype)
    return num_experts * (used.mean(0) * rows.mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """Penalise large logits, which make the softmax brittle.

    mean over samples and tokens of (log Σ_e exp logit_e)².

    Args:
        logits: `(B, E)` or `(B, T, E)` router logits, before temperature and hint.

    Returns:
        A non-negative scalar.

    Raises:
        ValueError: when `logits` has another number of dimensions.

    Source:
        Zoph et al., ST-MoE, arXiv:2202.08906, eq. 5.

    Example:
        >>> router_z_loss(torch.zeros(2, 3))  # (log 3)²
        tensor(1.2069)
    """
    _check_experts_last("logits", logits)
    return logits.logsumexp(-1).square().mean()


def _check_experts_last(name: str, value: Tensor) -> None:
    if value.ndim not in (2, 3):
        raise ValueError(
            f"Expected `{name}` to have shape (B, E) or (B, T, E), but got {tuple(value.shape)}."
        )
