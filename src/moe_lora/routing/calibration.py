"""Calibration of a router: the temperature at which its weights are probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moe_lora.routing.auxiliary_losses import labeled_logits

_HALVINGS = 40


@torch.no_grad()
def fit_temperature(
    logits: Tensor, labels: Tensor, *, lowest: float = 0.05, highest: float = 20.0
) -> float:
    """Fit the routing temperature to samples that the router was not trained on.

    argmin over T of −mean over labeled samples of log softmax(logits / T)_label. At this
    temperature, the weight of an expert is the share of similar samples for which it is right, as
    far as one number can achieve it: a router that errs often gets weights near 1/E, so that a
    wrong expert cannot cost much.

    Args:
        logits: `(B, E)`, `(B, T, E)` or `(B, L, E)` router logits, before temperature and hint.
        labels: `(B,)` integers, the index of the expert, or -1 for unknown.
        lowest: the smallest temperature, for logits that are always right; > 0.
        highest: the largest temperature, for logits that are no better than chance.

    Returns:
        The temperature, in [lowest, highest], for `routing_temperature` or
        `moe_lora.schedules.set_routing_temperature`.

    Raises:
        ValueError: as `router_supervision_loss`; without any label, for logits that are not finite,
            or unless 0 < lowest < highest.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599.

    Example:
        >>> logits = torch.tensor([[4.0, 0.0]]).expand(4, 2)
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 4 / log 3
        3.641
    """
    if not 0 < lowest < highest < math.inf:
        raise ValueError(
            f"Expected `lowest` and `highest` with 0 < lowest < highest, but got {lowest} and "
            f"{highest}."
        )
    rows, targets = labeled_logits(logits, labels)
    if not len(rows):
        raise ValueError("Expected at least one label in `labels`, but got none.")
    rows = rows.double()
    if not rows.isfinite().all():
        raise ValueError("Expected finite `logits`, but got NaN or inf.")
    chosen = rows.gather(1, targets.unsqueeze(1)).squeeze(1)
    # The loss is convex in 1 / T: its slope there is a mean of E_p[logit] − logit_label.
    low, high = 1 / highest, 1 / lowest
    for _ in range(_HALVINGS):
        middle = math.sqrt(low * high)
        mean_logits = ((rows * middle).softmax(-1) * rows).sum(-1)
        if float((mean_logits - chosen).mean()) > 0:
            high = middle
        else:
            low = middle
    return 1 / math.sqrt(low * high)
