"""Routers with input-independent weights: uniform and fixed."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.base import Router
from moe_lora.routing.routers.gating import RoutingStrategy, gate, task_hints
from moe_lora.routing.routers.registry import register_router


class _InputFreeRouter(Router):
    @abstractmethod
    def _expert_logits(self) -> list[float]:
        """Return the logits, one per expert."""

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return the same logits for every sample.

        Args:
            inputs: the inputs of the call; only batch size and device are used.

        Returns:
            `(B, E)`, float32.
        """
        row = torch.tensor(self._expert_logits(), device=inputs.hidden_states.device)
        return row.expand(inputs.batch_size, -1)

    def fixed_weights(self) -> Tensor:
        """Return the `(E,)` weights of every call without a task hint."""
        return gate(
            torch.tensor(self._expert_logits()),
            self.strategy,
            temperature=self.temperature,
            top_k=self.top_k,
        )


@register_router("uniform")
class UniformRouter(_InputFreeRouter):
    """Router with the same weight, 1/E, for every expert.

    The number of experts comes from `configure`. A task hint changes the weights.

    Example:
        >>> UniformRouter().configure(["a", "b", "c", "d"]).fixed_weights()
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    new_expert_logit: ClassVar[float] = 0.0

    def configure(
        self,
        expert_names: Sequence[str],
        *,
        strategy: RoutingStrategy = "soft",
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Router:
        """Set the experts; see `Router.configure`.

        Raises:
            ValueError: for a strategy other than "soft", since equal logits have no largest one.
        """
        super().configure(expert_names, strategy=strategy, temperature=temperature, top_k=top_k)
        if strategy != "soft":
            raise ValueError(
                f'Expected `routing_strategy` to be "soft" with the uniform router, since its '
                f"logits are all equal, but got {strategy!r}."
            )
        return self

    def add_expert(self, logit: float) -> None:
        """Add an expert, with the weight 1/E of all.

        Raises:
            ValueError: for a logit other than 0, since all weights are equal.
        """
        if logit != 0:
            raise ValueError(
                f"Expected `router_logit` to be 0 for the uniform router, but got {logit}."
            )

    def remove_expert(self, index: int) -> None:
        """Remove an expert; the others have the weight 1/E."""

    def _expert_logits(self) -> list[float]:
        if self.expert_names is None:
            raise ValueError(
                "UniformRouter has no experts yet. Call configure(expert_names) first."
            )
        return [0.0] * len(self.expert_names)


@register_router("fixed")
class FixedRouter(_InputFreeRouter):
    """Router with the same given weights for every sample.

    The logits are log(weights), so that strategy, temperature and task hints act as on any router:
    with "soft", temperature 1 and no hint, the routing weights are `weights`.

    Args:
        weights: one per expert, in the order of the experts; ≥ 0, sum 1.

    Raises:
        ValueError: for negative weights or a sum other than 1 (to 1e-4).

    Example:
        >>> FixedRouter([0.5, 0.5, 0.0]).fixed_weights()
        tensor([0.5000, 0.5000, 0.0000])
    """

    new_expert_logit: ClassVar[float] = -math.inf

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = tuple(float(weight) for weight in weights)
        if not all(weight >= 0 for weight in self.weights):
            raise ValueError(f"Expected `weights` to be >= 0, but got {list(self.weights)}.")
        if not abs(sum(self.weights) - 1) <= 1e-4:
            raise ValueError(
                f"Expected `weights` to sum to 1, but {list(self.weights)} sum to "
                f"{sum(self.weights):.6g}."
            )

    def configure(
        self,
        expert_names: Sequence[str],
        *,
        strategy: RoutingStrategy = "soft",
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Router:
        """Set experts, strategy and temperature; see `Router.configure`.

        Raises:
            ValueError: when the number of weights is not the number of experts.
        """
        if len(expert_names) != len(self.weights):
            raise ValueError(
                f"Expected `weights` to have one entry per expert, {len(expert_names)} in all, "
                f"but got {len(self.weights)}."
            )
        return super().configure(
            expert_names, strategy=strategy, temperature=temperature, top_k=top_k
        )

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return log(weights) for every sample.

        Args:
            inputs: the inputs of the call; only batch size, device and hint are used.

        Returns:
            `(B, E)`, float32; -inf where the weight is 0.

        Raises:
            ValueError: for a task hint for an expert with weight 0.
        """
        names = self.expert_names or [f"expert_{i}" for i in range(len(self.weights))]
        hint = inputs.task_hint
        hints = {hint} if hint is None or isinstance(hint, str) else set(hint)
        for name, weight in zip(names, self.weights, strict=True):
            if weight == 0 and hints.intersection(task_hints([name])):
                raise ValueError(
                    f"Expected `task_hint` to name an expert with a weight > 0, but got "
                    f"{hint!r}, and the fixed weight of {name!r} is 0."
                )
        return super().logits(inputs)

    def add_expert(self, logit: float) -> None:
        """Add an expert with the weight softmax(log(weights), logit); 0 for -inf, the default.

        Args:
            logit: any number.
        """
        odds = math.exp(-abs(logit))
        share = 1 / (1 + odds) if logit > 0 else odds / (1 + odds)
        self._set_weights([*(weight * (1 - share) for weight in self.weights), share])

    def remove_expert(self, index: int) -> None:
        """Remove an expert, and divide the other weights by their sum.

        Args:
            index: the index of the expert.

        Raises:
            ValueError: when the other weights are all 0.
        """
        others = [weight for place, weight in enumerate(self.weights) if place != index]
        if not any(others):
            raise ValueError(
                f"Expected another expert with a weight > 0, but the weights are "
                f"{list(self.weights)}. Attach a FixedRouter with other weights first."
            )
        total = sum(others) if self.weights[index] else 1.0
        self._set_weights([weight / total for weight in others])

    def _set_weights(self, weights: list[float]) -> None:
        self.weights = tuple(weights)
        self.init_kwargs["weights"] = weights

    def _expert_logits(self) -> list[float]:
        return [math.log(weight) if weight > 0 else -math.inf for weight in self.weights]
