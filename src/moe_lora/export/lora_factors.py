"""Plain LoRAs and mixtures as tables of factors by layer, wherever they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.config import MoELoraConfig


class Factors(NamedTuple):
    """Hold one layer of a plain LoRA, whose change of the weight is `up @ down`.

    The strength (alpha / rank) is already in `up`.

    Attributes:
        down: `(R, in)`, or `(R, in, kh, kw)` of a convolution.
        up: `(out, R)`.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Return the rank `R`."""
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """Return the change of the layer's weight, in at least float32, in the weight's shape.

        Example:
            >>> Factors(torch.ones(1, 2), torch.tensor([[3.0]])).delta()
            tensor([[3., 3.]])
        """
        precise = torch.promote_types(self.down.dtype, torch.float32)
        delta = self.up.to(precise) @ self.down.to(precise).flatten(1)
        return delta.view(self.up.shape[0], *self.down.shape[1:])

    def norm(self) -> float:
        """Return the Frobenius norm of `up @ down` without forming it.

        `‖B A‖² = sum((Bᵀ B) ⊙ (A Aᵀ))`

        Example:
            >>> Factors(torch.ones(1, 2), torch.tensor([[3.0], [4.0]])).norm()
            7.0710678118654755
        """
        down, up = self.down.double().flatten(1), self.up.double()
        square = ((up.T @ up) * (down @ down.T)).sum()
        return float(square.clamp(min=0).sqrt())


PlainLora = dict[str, Factors]
"""A plain LoRA: the factors of every adapted layer, by the layer's path in the base model."""


class LayerExperts(NamedTuple):
    """Hold the experts of one layer.

    Attributes:
        lora_A: `(E, r, in)`, or `(E, r, in, kh, kw)` of a convolution.
        lora_B: `(out, E, r)`.
        scaling: what the product is multiplied with.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


@dataclass(frozen=True)
class ExpertTable:
    """Hold all experts of one adapter, apart from any model.

    Attributes:
        config: the adapter's configuration.
        layers: the experts of every adapted layer, by the layer's path in the base model.
        base_class: class name of the base model, if it is known.
        in_channels: the base model's input width, if it is known.
    """

    config: MoELoraConfig
    layers: Mapping[str, LayerExperts]
    base_class: str | None = None
    in_channels: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the expert names in order."""
        return self.config.experts

    def check_plain(self) -> None:
        """Raise when the adapter trains whole modules, which no plain LoRA holds."""
        if self.config.modules_to_save:
            raise ValueError(
                f"Expected experts only, but the adapter trains "
                f"{sorted(self.config.modules_to_save)} whole (`modules_to_save`), which no plain "
                "LoRA holds."
            )

    def mixed(self, weights: Tensor) -> PlainLora:
        """Return the plain LoRA that the mixture is under fixed weights.

        `A = cat(A_e), B = cat(w_e · s · B_e)` over the experts whose weight is not 0.

        Args:
            weights: `(E,)`.

        Raises:
            ValueError: when the adapter trains whole modules, which no plain LoRA holds.
        """
        self.check_plain()
        return {path: mix(experts, weights) for path, experts in self.layers.items()}

    def expert(self, index: int) -> PlainLora:
        """Return one expert as a plain LoRA.

        Args:
            index: its place among `names`.
        """
        return self.mixed(torch.eye(len(self.names))[index])


def mix(experts: LayerExperts, weights: Tensor) -> Factors:
    """Put the experts of one layer side by side; see `ExpertTable.mixed`.

    Args:
        experts: the layer's experts.
        weights: `(E,)`.

    Returns:
        Factors of rank `r` times the number of experts whose weight is not 0.
    """
    lora_A, lora_B, scaling = experts
    chosen = weights.nonzero().flatten().tolist()
    precise = torch.promote_types(lora_B.dtype, torch.float32)
    gate = weights[chosen].to(lora_B.device, precise) * scaling
    up = lora_B[:, chosen].to(precise) * gate.view(1, -1, 1)
    return Factors(lora_A[chosen].flatten(0, 1), up.flatten(1).to(lora_B.dtype))
