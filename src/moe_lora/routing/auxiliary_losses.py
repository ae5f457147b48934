"""Auxiliary losses of a router: load balancing, z-loss, an entropy floor, and labels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balancing_loss(weights: Tensor) -> Tensor:
    """Penalize uneven use of the experts.

    E · Σ_e f_e · P_e, where f_e is the share of samples (or tokens) whose largest weight is expert
    e and P_e the mean weight of expert e. It is 1 at perfect balance and `E` when every weight is
    on one expert. The gradient flows through P only, since f is a count.

    Args:
        weights: `(B, E)`, `(B, T, E)` or `(B, L, E)` routing weights, rows sum to 1.

    Returns:
        A scalar in [0, E], the mean over samples and tokens.

    Raises:
        ValueError: when `weights` has another number of dimensions.

    Source: Fedus, Zoph, Shazeer, "Switch Transformers", 2021, arXiv:2101.03961, equations 4 to 6,
        without the factor α.

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
    """Penalize large logits, which saturate the softmax.

    mean over samples and tokens of (log Σ_e exp logit_e)².

    Args:
        logits: `(B, E)`, `(B, T, E)` or `(B, L, E)` router logits, before temperature and hint.

    Returns:
        A non-negative scalar.

    Raises:
        ValueError: when `logits` has another number of dimensions.

    Source: Zoph et al., "ST-MoE", 2022, arXiv:2202.08906, equation 5.

    Example:
        >>> router_z_loss(torch.zeros(2, 3))  # (log 3)²
        tensor(1.2069)
    """
    _check_experts_last("logits", logits)
    return logits.logsumexp(-1).square().mean()


def entropy_floor_loss(weights: Tensor, floor: float = 0.5) -> Tensor:
    """Penalize a mean entropy of the routing weights below a floor.

    max(0, floor − mean over samples and tokens of H), with the entropy H = −Σ_e w_e log w_e / log E
    of a sample's weights. Above the floor, value and gradient are 0.

    Weights of the strategy "hard" have entropy 0, and those of "topk" at most log k / log E: use
    `logits.softmax(-1)` for the first, and a floor below that limit for the second.

    Args:
        weights: `(B, E)`, `(B, T, E)` or `(B, L, E)` routing weights, rows sum to 1; E >= 2.
        floor: in (0, 1); an entropy of 1 means equal weights, 0 one expert per sample.

    Returns:
        A scalar in [0, floor].

    Raises:
        ValueError: for another number of dimensions, fewer than two experts, or a `floor` outside
            (0, 1).

    Example:
        >>> entropy_floor_loss(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), floor=0.75)
        tensor(0.2500)
    """
    _check_experts_last("weights", weights)
    num_experts = weights.shape[-1]
    if num_experts < 2:
        raise ValueError(f"Expected `weights` of at least 2 experts, but got {num_experts}.")
    if not 0 < floor < 1:
        raise ValueError(f"Expected `floor` to be in (0, 1), but got {floor}.")
    # The logarithm's slope at 0 is infinite, and a softmax would make NaN of it.
    logs = weights.clamp_min(torch.finfo(weights.dtype).tiny).log()
    entropy = -(weights * logs).sum(-1).mean() / math.log(num_experts)
    return (floor - entropy).clamp_min(0)


def router_supervision_loss(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Teach a router the expert of each sample: the cross-entropy of its logits.

    −mean over labeled samples of log softmax(logits)_label. Samples with a negative label do not
    count. For weights per token or per layer, the label holds for all of them.

    Args:
        logits: `(B, E)`, `(B, T, E)` or `(B, L, E)` router logits, before temperature and hint.
        labels: `(B,)` integers, the index of the expert, or -1 for unknown.
        label_smoothing: the part of the target that all experts share, in [0, 1).

    Returns:
        A non-negative scalar; 0, with gradients of 0, without any label.

    Raises:
        ValueError: for another number of dimensions, labels of another shape, that are no integers
            or no experts, or a `label_smoothing` outside [0, 1).

    Example:
        >>> router_supervision_loss(torch.tensor([[2.0, 0.0], [0.0, 9.0]]), torch.tensor([0, -1]))
        tensor(0.1269)
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"Expected `label_smoothing` to be in [0, 1), but got {label_smoothing}.")
    rows, targets = labeled_logits(logits, labels)
    if not len(rows):
        return logits.sum() * 0.0
    return F.cross_entropy(rows, targets, label_smoothing=label_smoothing)


def labeled_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Select the logits of labeled samples, with one label for each row.

    Args:
        logits: `(B, E)`, `(B, T, E)` or `(B, L, E)` router logits.
        labels: `(B,)` integers, the index of the expert, or -1 for unknown.

    Returns:
        `(N, E)` logits and `(N,)` labels in int64; N is 0 without any label.

    Raises:
        ValueError: for another number of dimensions, or labels of another shape, that are no
            integers or no experts.
    """
    _check_experts_last("logits", logits)
    num_experts = logits.shape[-1]
    if labels.shape != logits.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"Expected `labels` to be {len(logits)} integers, one per sample, but got "
            f"{tuple(labels.shape)} in {labels.dtype}."
        )
    if (labels >= num_experts).any():
        raise ValueError(
            f"Expected `labels` below the number of experts, {num_experts}, but got "
            f"{int(labels.max())}."
        )
    known = labels >= 0
    targets = labels[known].long()
    rows = logits[known].reshape(len(targets), math.prod(logits.shape[1:-1]), num_experts)
    return rows.flatten(0, 1), targets.repeat_interleave(rows.shape[1])


def _check_experts_last(name: str, value: Tensor) -> None:
    if value.ndim not in (2, 3):
        raise ValueError(
            f"Expected `{name}` to have shape (B, E) or (B, T, E), but got {tuple(value.shape)}."
        )
