"""What the contexts that are open around a pass ask of its routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.routing.inputs import GivenInputs
from moe_lora.routing.weights.routing import Routing, new_version


@dataclass(frozen=True, eq=False)
class Override:
    """Weights that win over mode and router; see `moe_lora.route`."""

    weights: Tensor
    top_k: int | None = None
    version_at_start: Tensor | None = None
    changes: int | None = None

    @classmethod
    def of(cls, weights: Tensor, top_k: int | None = None) -> Override:
        """Remember the weights, and their state, under a version of their own."""
        if weights.ndim == 2 and weights.shape[0] == 1 and top_k is None:
            weights = weights[0]  # one row serves all samples, in compiled models too
        return cls(weights, top_k, new_version(), _changes(weights))

    @property
    def is_unchanged(self) -> bool:
        """Whether the weights are known to be what they were."""
        return self.changes is not None and _changes(self.weights) == self.changes

    @property
    def version(self) -> Tensor | None:
        """The version of routings by these weights, a new one where they may have changed."""
        return self.version_at_start if self.is_unchanged else new_version()


class Ablation(NamedTuple):
    """An expert that is left out, and whether the others share its weight."""

    adapter_name: str
    expert: int
    renormalize: bool


@dataclass(frozen=True, eq=False)
class Steering:
    """What the contexts that are open around a pass ask of its routing.

    Args:
        override: the innermost `route`.
        ablations: of all `ablate_expert`.
        expert_grad_mask: of the innermost `teach_experts`, `(B, E)`.
        given: of the innermost `router_inputs`.
        outside: the routing of layers that run outside of any pass.
        changes: what each of the contexts asks for, in the order in which they were opened.
    """

    override: Override | None = None
    ablations: tuple[Ablation, ...] = ()
    expert_grad_mask: Tensor | None = None
    given: GivenInputs | None = None
    outside: Routing | None = None
    changes: tuple[Steering, ...] = ()

    def changed_by(self, inner: Steering) -> Steering:
        """Return what this and a context inside it ask for together."""
        mask = inner.expert_grad_mask
        return Steering(
            override=inner.override or self.override,
            ablations=(*self.ablations, *inner.ablations),
            expert_grad_mask=self.expert_grad_mask if mask is None else mask,
            given=inner.given or self.given,
        )


NO_STEERING = Steering()


def check_override(weights: Tensor, top_k: int | None) -> None:
    """Raise unless weights, and the number of those that differ from 0, describe an override."""
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(
            f"Expected `weights` to be a floating-point tensor, but got {type(weights)}."
        )
    if weights.ndim not in (1, 2, 3):
        raise ValueError(
            "Expected `weights` to have shape (E,), (batch, E) or (batch, tokens, E), but got "
            f"{tuple(weights.shape)}."
        )
    if top_k is None:
        return
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= weights.shape[-1]:
        raise ValueError(
            f"Expected `top_k` to be in [1, num_experts={weights.shape[-1]}], but got {top_k}."
        )
    if ((weights != 0).sum(-1) > top_k).any():
        raise ValueError(
            f"Expected at most `top_k`={top_k} weights of a row to differ from 0, but got more."
        )


def _changes(tensor: Tensor) -> int | None:
    """Count the changes of a tensor in place, where it counts them."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
