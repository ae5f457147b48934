"""Effect of the open contexts (`route`, `ablate_expert`, ...) on the routing of a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.routing.inputs import GivenInputs
from moe_lora.routing.weights.routing import Routing, new_version


@dataclass(frozen=True, eq=False)
class Override:
    """Weights that override mode and router; see `moe_lora.route`.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        top_k: the maximal number of non-zero weights in a row, if it is known.
        initial_version: the routing version for the initial values of the weights.
        initial_changes: the number of in-place changes of the weights at the start; `None` when
            torch counts none.
    """

    weights: Tensor
    top_k: int | None = None
    initial_version: Tensor | None = None
    initial_changes: int | None = None

    @classmethod
    def from_weights(cls, weights: Tensor, top_k: int | None = None) -> Override:
        """Create the override of given weights, with a new routing version."""
        if weights.ndim == 2 and weights.shape[0] == 1 and top_k is None:
            weights = weights[0]  # one row applies to all samples, in compiled models too
        return cls(weights, top_k, new_version(), _in_place_changes(weights))

    @property
    def is_unchanged(self) -> bool:
        """Return whether the weights are known to be unchanged since the start."""
        return (
            self.initial_changes is not None
            and _in_place_changes(self.weights) == self.initial_changes
        )

    @property
    def version(self) -> Tensor | None:
        """Return the routing version of the weights, a new one if they may have changed."""
        return self.initial_version if self.is_unchanged else new_version()


class Ablation(NamedTuple):
    """Ablated expert of an adapter, with or without renormalization of the others."""

    adapter_name: str
    expert: int
    renormalize: bool


@dataclass(frozen=True, eq=False)
class Steering:
    """Combined effect of the open contexts on the routing of a pass.

    Args:
        override: the weights of the innermost `route`.
        ablations: the ablations of all `ablate_expert`.
        expert_grad_mask: `(B, E)`, the mask of the innermost `teach_experts`.
        given: the inputs of the innermost `router_inputs`.
        outside_pass: the routing of layers that run outside of any pass.
        contexts: the effect of each open context, in the order of their opening.
    """

    override: Override | None = None
    ablations: tuple[Ablation, ...] = ()
    expert_grad_mask: Tensor | None = None
    given: GivenInputs | None = None
    outside_pass: Routing | None = None
    contexts: tuple[Steering, ...] = ()

    def combined_with(self, inner: Steering) -> Steering:
        """Return the combined effect with a context inside of these."""
        mask = inner.expert_grad_mask
        return Steering(
            override=inner.override or self.override,
            ablations=(*self.ablations, *inner.ablations),
            expert_grad_mask=self.expert_grad_mask if mask is None else mask,
            given=inner.given or self.given,
        )


NO_STEERING = Steering()


def check_override(weights: Tensor, top_k: int | None) -> None:
    """Raise unless the weights and `top_k` of an override are valid.

    Args:
        weights: `(E,)`, `(B, E)` or `(B, T, E)`.
        top_k: the maximal number of non-zero weights in a row; `None` means no limit.

    Raises:
        TypeError: for anything but a floating-point tensor.
        ValueError: for another shape, a `top_k` outside [1, E], or rows with more non-zero weights.
    """
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
            f"Expected at most `top_k`={top_k} non-zero weights per row, but got more."
        )


def _in_place_changes(tensor: Tensor) -> int | None:
    """Return the number of in-place changes of a tensor; `None` where torch counts none."""
    return None if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version
