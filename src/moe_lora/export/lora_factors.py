"""Plain LoRAs as factors by layer, independent of any file or model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """One layer of a plain LoRA, whose change of the weight is `up @ down`.

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
