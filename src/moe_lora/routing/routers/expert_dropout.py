"""Expert dropout: in training, samples drop whole experts, so that all experts get trained."""

from __future__ import annotations

import torch
from torch import Tensor


def check_expert_dropout(p: float) -> None:
    """Raise unless the probability of dropping an expert is in [0, 1).

    Args:
        p: the probability.

    Raises:
        ValueError: for a probability outside [0, 1).
    """
    if not 0 <= p < 1:
        raise ValueError(f"Expected `expert_dropout` to be in [0, 1), but got {p}.")


def drop_experts(logits: Tensor, p: float) -> Tensor:
    """Set the logits of randomly chosen experts to -inf.

    In every sample each expert is dropped independently with probability p, for all tokens at once.
    At least one expert with a finite logit remains: when all would be dropped, one of them, drawn
    uniformly, is kept. The softmax of the result is the renormalized softmax of the remaining
    experts; the strategies "hard" and "topk" select among them.

    Args:
        logits: `(B, ..., E)`.
        p: in [0, 1). Draws come from torch's generator of the logits' device.

    Returns:
        The shape of `logits`.

    Raises:
        ValueError: for a `p` outside [0, 1).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> drop_experts(torch.zeros(2, 3), 0.5)
        tensor([[-inf, 0., -inf],
                [-inf, -inf, 0.]])
    """
    check_expert_dropout(p)
    batch, experts = logits.shape[0], logits.shape[-1]
    shape = (batch, *[1] * (logits.ndim - 2), experts)
    draws = torch.rand(shape, device=logits.device).expand_as(logits)
    # An expert remains by its own draw, or because its draw is the largest.
    open_draws = draws.masked_fill(logits == -torch.inf, -1.0)
    best = open_draws.argmax(-1, keepdim=True) == torch.arange(experts, device=logits.device)
    return logits.masked_fill(~(best | (draws >= p)), -torch.inf)
