"""How the experts are used, counted without waiting for the device."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lora.tracing import is_transformed

_UPDATING = threading.Lock()  # passes of several threads are counted by one model


class RoutingStats:
    """Accumulate expert usage over the calls of a routed model.

    `update` only queues arithmetic on the weights' device; reading a value waits for it. Token
    weights count as the mean over the tokens of each sample. Samples with a weight that is NaN or
    infinite are left out of every number and counted apart. Before the first update every number
    but the counts is NaN. It is a plain object: no part of a `state_dict`, safe to copy and pickle.

    Args:
        expert_names: the experts in the order of the weights.

    Example:
        >>> stats = RoutingStats(["removal_expert", "background_expert", "completion_expert"])
        >>> stats.update(torch.tensor([[0.45, 0.35, 0.20]]))
        >>> stats.log_line()
        'Expert Usage: removal=0.45, background=0.35, completion=0.20'
    """

    def __init__(self, expert_names: Sequence[str]) -> None:
        self.expert_names = tuple(expert_names)
        self.reset()

    def reset(self) -> None:
        """Forget everything seen so far."""
        # On the CPU, not on a default device: it follows the weights once there are some.
        nothing = torch.full((len(self.expert_names),), math.nan, device="cpu")
        self._usage = torch.zeros(len(self.expert_names), dtype=torch.int64, device="cpu")
        self._current, self._mean = nothing, nothing
        self._entropy = torch.tensor(math.nan, device="cpu")
        self._samples = torch.tensor(0, device="cpu")
        self._seen = 0
        self._warned = False

    def update(self, weights: Tensor) -> None:
        """Add the weights of one call.

        Traced and transformed weights have no values to count and are skipped.

        Args:
            weights: `(B, E)`, `(B, T, E)` or `(B, L, E)`, rows sum to 1; detached here.

        Raises:
            ValueError: when `weights` has another shape.
        """
        experts = len(self.expert_names)
        if weights.ndim not in (2, 3) or weights.shape[-1] != experts:
            raise ValueError(
                f"Expected `weights` to have shape (B, {experts}) or (B, T, {experts}), but got "
                f"{tuple(weights.shape)}."
            )
        if weights.shape[0] == 0 or is_transformed():
            return
        rows = weights.detach().float()
        if rows.ndim == 3:
            rows = rows.mean(1)
        device = rows.device
        finite = rows.isfinite().all(-1, keepdim=True)
        rows, count = rows.where(finite, 0.0), finite.sum()
        largest = rows.argmax(-1, keepdim=True) == torch.arange(experts, device=device)
        entropies = torch.special.entr(rows).sum(-1) / math.log(max(experts, 2))
        with _UPDATING:
            self._seen += rows.shape[0]
            self._usage = self._usage.to(device) + (largest & finite).sum(0)
            self._current = rows.sum(0) / count
            self._samples = self._samples.to(device) + count
            self._mean = self._mean_with(self._mean.to(device), rows.sum(0), count)
            self._entropy = self._mean_with(self._entropy.to(device), entropies.sum(), count)

    def _mean_with(self, mean: Tensor, total: Tensor, count: Tensor) -> Tensor:
        """Take the sum over `count` more samples into a mean over all finite samples."""
        before = torch.where(self._samples > count, mean * (1 - count / self._samples), 0.0)
        return torch.where(count > 0, before + total / self._samples, mean)

    @property
    def usage(self) -> list[int]:
        """Count the samples whose largest weight was each expert's, since the last reset."""
        return [int(count) for count in self._usage.tolist()]

    @property
    def non_finite_samples(self) -> int:
        """Count the samples with a weight that was NaN or infinite, since the last reset.

        Example:
            >>> stats = RoutingStats(["a", "b"])
            >>> stats.update(torch.tensor([[0.75, 0.25], [float("nan"), 0.5]]))
            >>> stats.non_finite_samples, stats.mean_weights
            (1, [0.75, 0.25])
        """
        return self._seen - int(self._samples)

    @property
    def current_weights(self) -> list[float]:
        """Return the mean weights of the last call's batch, one per expert."""
        return [float(weight) for weight in self._current.tolist()]

    @property
    def mean_weights(self) -> list[float]:
        """Return the mean weights over all samples since the last reset, one per expert."""
        return [float(weight) for weight in self._mean.tolist()]

    @property
    def entropy(self) -> float:
        """Return the mean entropy of the samples' weights over log E.

        0 when every sample takes one expert, 1 when every sample takes all experts equally.
        """
        return float(self._entropy)

    def as_dict(self) -> dict[str, int | list[float]]:
        """Return `expert_0_usage`, `expert_1_usage`, … and `current_weights`.

        Example:
            >>> stats = RoutingStats(["a", "b"])
            >>> stats.update(torch.tensor([[0.75, 0.25], [0.0, 1.0]]))
            >>> stats.as_dict()
            {'expert_0_usage': 1, 'expert_1_usage': 1, 'current_weights': [0.375, 0.625]}
        """
        values: dict[str, int | list[float]] = {
            f"expert_{i}_usage": count for i, count in enumerate(self.usage)
        }
        values["current_weights"] = self.current_weights
        return values

    def log_line(self) -> str:
        """Return the running mean weights as one line of a training log.

        Experts appear by their names without `_expert`.
        """
        shares = ", ".join(
            f"{name.removesuffix('_expert')}={weight:.2f}"
            for name, weight in zip(self.expert_names, self.mean_weights, strict=True)
        )
        return f"Expert Usage: {shares}"

    def is_collapsed(self, threshold: float = 0.9) -> bool:
        """Tell whether one expert's running mean weight is above a threshold.

        Args:
            threshold: in (0, 1).
        """
        return max(self.mean_weights) > threshold

    def idle_experts(self, threshold: float = 0.01) -> tuple[str, ...]:
        """Name the experts whose running mean weight is below a threshold.

        An expert may be idle without a collapse: with three, two may share all the weight.

        Args:
            threshold: in (0, 1).

        Example:
            >>> stats = RoutingStats(["a", "b", "c"])
            >>> stats.update(torch.tensor([[0.6, 0.4, 0.0]]))
            >>> stats.idle_experts(), stats.is_collapsed()
            (('c',), False)
        """
        pairs = zip(self.expert_names, self.mean_weights, strict=True)
        return tuple(name for name, weight in pairs if weight < threshold)

    def collapse_warning(self, threshold: float = 0.9) -> str | None:
        """Return a warning the first time that the router is found collapsed, else `None`.

        A router whose weights are NaN or infinite is one, too. `reset` arms it again.

        Args:
            threshold: as in `is_collapsed`.
        """
        if self._warned:
            return None
        if self.non_finite_samples:
            self._warned = True
            return (
                f"The router gave weights that are NaN or infinite to {self.non_finite_samples} "
                f"of the last {self._seen} samples. Look for inf and NaN in its inputs and "
                "parameters; clip gradients or lower the learning rate."
            )
        if not self.is_collapsed(threshold):
            return None
        self._warned = True
        means = self.mean_weights
        taker = max(range(len(means)), key=means.__getitem__)
        return (
            f"The router has collapsed: {self.expert_names[taker]} takes {means[taker]:.0%} of the "
            f"weight over the last {self._seen} samples. Raise the load-balancing weight, the "
            "entropy floor's weight or the routing temperature, drop experts in training, or train "
            "longer with uniform weights first."
        )
