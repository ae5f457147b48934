"""From logits to routing weights: strategies, temperature and task hints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

RoutingStrategy = Literal["soft", "hard", "topk"]

HINT_BIAS = 2.0
"""The addition of a hint `<expert>_focus` to the logit of its expert, odds times e² = 7.4 at
temperature 1.
"""


def check_gate(
    strategy: str, temperature: float, top_k: int | None, num_experts: int | None = None
) -> None:
    """Raise unless the settings of a gate are valid.

    Args:
        strategy: "soft", "hard" or "topk".
        temperature: divisor of the logits; > 0.
        top_k: the number of experts with a non-zero weight; only with "topk".
        num_experts: the number of experts, if it is known.

    Raises:
        ValueError: for an unknown strategy, a temperature that is not positive, `top_k` missing
            for `"topk"`, given for another strategy, or outside [1, num_experts].
    """
    if strategy not in get_args(RoutingStrategy):
        raise ValueError(
            f"Expected `routing_strategy` to be one of {list(get_args(RoutingStrategy))}, "
            f"but got {strategy!r}."
        )
    if not temperature > 0:
        raise ValueError(f"Expected `routing_temperature` to be > 0, but got {temperature}.")
    if strategy == "topk" and top_k is None:
        raise ValueError('Expected `top_k` to be given with `routing_strategy="topk"`.')
    if strategy != "topk" and top_k is not None:
        raise ValueError(
            f'Expected `top_k` only with `routing_strategy="topk"`, but got top_k={top_k} with '
            f"{strategy!r}."
        )
    if top_k is not None and (top_k < 1 or (num_experts is not None and top_k > num_experts)):
        upper = "num_experts" if num_experts is None else f"num_experts={num_experts}"
        raise ValueError(f"Expected `top_k` to be in [1, {upper}], but got {top_k}.")


def gate(
    logits: Tensor,
    strategy: RoutingStrategy = "soft",
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """Compute routing weights from logits.

    `soft`: softmax(logits / temperature). `topk`: the same with all logits but the `top_k` largest
    set to -inf, so that the other weights are exactly 0. `hard`: one-hot at the largest logit, with
    the gradient of `soft` (straight-through). Layers with tokens skip experts of weight 0, so that
    only the other weights get a gradient.

    Args:
        logits: `(..., E)`, any real values.
        strategy: "soft", "hard" or "topk".
        temperature: divisor of the logits; > 0.
        top_k: the number of experts with a non-zero weight, in [1, E]; only with "topk".

    Returns:
        `(..., E)` in float32 (float64 for float64 logits); rows sum to 1.

    Raises:
        ValueError: as `check_gate`.

    Source: Shazeer et al., "Outrageously large neural networks", 2017, arXiv:1701.06538, equations
        3 and 5, without noise, for "topk"; Bengio, Léonard, Courville, 2013, arXiv:1308.3432, for
        the straight-through gradient of "hard".

    Example:
        >>> gate(torch.tensor([2.0, 1.0, -1.0]), "topk", top_k=2).round(decimals=3)
        tensor([0.7310, 0.2690, 0.0000])
    """
    check_gate(strategy, temperature, top_k, logits.shape[-1])
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = logits / temperature
    if strategy == "topk":
        assert top_k is not None
        keep = torch.zeros_like(logits, dtype=torch.bool)
        keep.scatter_(-1, logits.topk(top_k, dim=-1).indices, True)
        logits = logits.masked_fill(~keep, float("-inf"))
    weights = logits.softmax(dim=-1)
    if strategy == "hard":
        one_hot = torch.zeros_like(weights)
        one_hot.scatter_(-1, weights.argmax(dim=-1, keepdim=True), 1.0)
        weights = one_hot + (weights - weights.detach())
    return weights


def task_hints(expert_names: Sequence[str]) -> tuple[str, ...]:
    """List the task hints for a set of experts.

    Args:
        expert_names: the experts.

    Returns:
        `<stem>_focus` and `<stem>_only` per expert; the stem is the name without `_expert`.

    Example:
        >>> task_hints(["removal_expert", "background_expert"])
        ('removal_focus', 'removal_only', 'background_focus', 'background_only')
    """
    stems = [name.removesuffix("_expert") for name in expert_names]
    return tuple(f"{stem}_{kind}" for stem in stems for kind in ("focus", "only"))


def check_task_hint(hint: str | Sequence[str | None] | None, known: Sequence[str]) -> None:
    """Raise unless a hint, or every hint of a batch, is known.

    Args:
        hint: one hint, one per sample, or `None`.
        known: the valid hints.

    Raises:
        ValueError: for an unknown hint, or an empty sequence.
    """
    if hint is None or isinstance(hint, str):
        hint = (hint,)
    if not hint:
        raise ValueError("Expected `task_hint` to have one entry per sample, but got none.")
    for one in hint:
        if one is not None and one not in known:
            raise ValueError(f"Expected `task_hint` to be one of {list(known)}, but got {one!r}.")


def apply_task_hint(
    logits: Tensor, hint: str | Sequence[str | None] | None, expert_names: Sequence[str]
) -> Tensor:
    """Bias logits by a task hint.

    `<stem>_focus` adds `HINT_BIAS` to the expert's logit, `<stem>_only` sets all other logits to
    -inf; the stem is the expert's name without `_expert`.

    Args:
        logits: `(..., E)`; `(B, ..., E)` with one hint per sample.
        hint: one of `task_hints(expert_names)`, or `None` for no change; or `B` of them.
        expert_names: the `E` names, in the order of the logits.

    Returns:
        `(..., E)`, the biased logits.

    Raises:
        ValueError: for an unknown hint, or another number of hints than `B`.

    Example:
        >>> apply_task_hint(torch.zeros(2, 2), ["shadow_focus", None], ["shadow", "glow"])
        tensor([[2., 0.],
                [0., 0.]])
    """
    if hint is None:
        return logits
    hints = task_hints(expert_names)
    check_task_hint(hint, hints)
    if isinstance(hint, str):
        index, kind = divmod(hints.index(hint), 2)
        is_hinted = torch.arange(len(expert_names), device=logits.device) == index
        if kind == 0:
            return logits + HINT_BIAS * is_hinted.to(logits.dtype)
        return logits.masked_fill(~is_hinted, float("-inf"))
    if len(hint) != len(logits):
        raise ValueError(
            f"Expected `task_hint` to have one entry per sample, {len(logits)} in all, but got "
            f"{len(hint)}."
        )
    hinted = [
        apply_task_hint(rows, one, expert_names) for rows, one in zip(logits, hint, strict=True)
    ]
    return torch.stack(hinted)
