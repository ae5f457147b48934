"""Hint the router of the kind of each sample, or of one image."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

import moe_lora
from options.kind_options import HintForm, read_kind_experts


class KindHints:
    """Task hints by the kind of samples.

    Args:
        kinds: of the data, in the order of their indices.
        entries: experts by kind, see `read_kind_experts`; other kinds get no hint.
        form: of the hints: `only` for the expert alone, `focus` for more weight.
        dropout: share of the samples without a hint, where a generator is given.

    Raises:
        ValueError: when the data have none of the kinds.

    Example:
        >>> hints = KindHints(["glow", "shadow"], ["shadow=removal_expert"], "only")
        >>> hints.of(torch.tensor([1, 0, -1]))
        ['removal_only', None, None]
    """

    def __init__(
        self,
        kinds: Sequence[str],
        entries: Sequence[str],
        form: HintForm,
        *,
        dropout: float = 0.0,
    ) -> None:
        experts = read_kind_experts(entries)
        if not set(experts) & set(kinds):
            raise ValueError(
                f"Expected `kind_experts` for kinds of the data, {sorted(kinds)}, but got "
                f"{sorted(experts)}. The key `kind` in a manifest names the kind of a sample."
            )
        named = [experts.get(kind) for kind in kinds]
        # The index -1, of samples without a kind, finds the last entry.
        self.experts = [*named, None]
        self.hints = [
            f"{expert.removesuffix('_expert')}_{form}" if expert else None for expert in named
        ] + [None]
        self.dropout = dropout

    def of(self, kind: Tensor, generator: torch.Generator | None = None) -> list[str | None]:
        """Return the hints of samples.

        Args:
            kind: `(B,)`, indices of kinds, -1 for none.
            generator: of the draw which samples get no hint; none is left out without it.
        """
        hints = [self.hints[index] for index in kind.tolist()]
        if generator is None:
            return hints
        kept = torch.rand(len(hints), generator=generator) >= self.dropout
        return [hint if keep else None for hint, keep in zip(hints, kept.tolist(), strict=True)]

    def labels(self, kind: Tensor, expert_names: Sequence[str]) -> Tensor:
        """Return the index of the expert of each sample, -1 for none, `(B,)`.

        Args:
            kind: `(B,)`, indices of kinds, -1 for none.
            expert_names: of the mixture.

        Example:
            >>> hints = KindHints(["glow", "shadow"], ["shadow"], "only")
            >>> hints.labels(torch.tensor([1, 0]), ["text", "shadow"])
            tensor([ 1, -1])
        """
        experts = [self.experts[index] for index in kind.tolist()]
        names = list(expert_names)
        found = [-1 if expert is None else names.index(expert) for expert in experts]
        return torch.tensor(found, device=kind.device)

    def given(
        self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator | None = None
    ) -> AbstractContextManager[None]:
        """Return a context in which the router of a model gets the hints of a batch."""
        return moe_lora.router_inputs(model, task_hint=self.of(batch["kind"], generator))


def set_task_hint(transformer: nn.Module, hint: str | None) -> None:
    """Hint the router of a loaded checkpoint in all later calls.

    Raises:
        ValueError: for an unknown hint, or without a router that could follow it.
    """
    if hint is None:
        return
    if not any(isinstance(module, moe_lora.Router) for module in transformer.modules()):
        raise ValueError(f"Expected a checkpoint with a router for the task hint {hint!r}.")
    moe_lora.set_router_inputs(transformer, task_hint=hint)
