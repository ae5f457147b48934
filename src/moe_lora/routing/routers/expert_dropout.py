"""Leave whole experts out of training steps, so that none of them is left untrained."""

from __future__ import annotations

import torch
from torch import Tensor


def check_expert_dropout(p: float) -> None:
    """Raise unless a probability of dropping an expert is in [0, 1).

    Raises:
        ValueError: otherwise.
    """
    if not 0 <= p < 1:
        raise ValueError(f"Expected `expert_dropout` to be in [0, 1), but got {p}.")


def drop_experts(logits: Tensor, p: float) -> Tensor:
    """Set the logits of randomly chosen experts to -inf.

    In every sample each expert is dropped with probability p, by itself, for all tokens alike. One
    of those whose logit is not -inf already always stays: where all would go, each of them is
    spared with the same probability. The softmax of what is left is the softmax of all,
    renormalized; the strategies "hard" and "topk" choose among those that stay.

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
    # An expert stays by its own draw, or because no other that could stay has drawn better.
    open_draws = draws.masked_fill(logits == -torch.inf, -1.0)
    best = open_draws.argmax(-1, keepdim=True) == torch.arange(experts, device=logits.device)
    return logits.masked_fill(~(best | (draws >= p)), -torch.inf)
