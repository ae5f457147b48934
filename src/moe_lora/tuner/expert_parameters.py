"""Storage of the experts' factors: whole, or split into trained and frozen experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

EXPERT_DIMENSION = {"lora_A": 0, "lora_B": 1}
"""The dimension of the experts in each factor."""

TRAINED, FROZEN = "_trained", "_frozen"


class _Run(NamedTuple):
    """Neighboring experts in one part of a split factor.

    Attributes:
        part: `TRAINED` or `FROZEN`.
        start: the index of the first of them in the part.
        length: the number of experts.
    """

    part: str
    start: int
    length: int


class ExpertParameters(nn.Module):
    """Base class for the factors of several experts, of which some can be frozen.

    `lora_A` is `(E, r, *in_shape)` and `lora_B` `(out, E, r)`. Frozen experts need parameters of
    their own: an optimizer decays a whole parameter and keeps moments for it, whatever parts of its
    gradient are zero. `freeze_except` therefore splits each factor into `lora_A_trained` and
    `lora_A_frozen`; reading `lora_A` then concatenates them, in the order of the experts.

    Attributes:
        trained_experts: the indices of the experts that are not frozen; `None` for all.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.trained_experts: tuple[int, ...] | None = None
        self._runs: tuple[_Run, ...] = ()
        self.lora_A = nn.Parameter(lora_A)
        self.lora_B = nn.Parameter(lora_B)

    @property
    def num_experts(self) -> int:
        """Return the number of experts."""
        if self._runs:
            return sum(run.length for run in self._runs)
        return self.lora_A.shape[EXPERT_DIMENSION["lora_A"]]

    @property
    def is_split(self) -> bool:
        """Return whether trained and frozen experts are separate parameters."""
        return bool(self._runs)

    def __getattr__(self, name: str) -> Any:
        if name in EXPERT_DIMENSION and self.__dict__.get("_runs"):
            # By attribute: replicas of DataParallel have no parameters.
            return self._join(name, {name + p: getattr(self, name + p) for p in (TRAINED, FROZEN)})
        return super().__getattr__(name)

    def expert(self, index: int) -> tuple[Tensor, Tensor]:
        """Return views of one expert's factors, `(r, *in_shape)` and `(out, r)`.

        Args:
            index: the index of the expert.
        """
        part, index = self._locate(index)
        a, b = (self._parameters[name + part] for name in EXPERT_DIMENSION)
        assert a is not None
        assert b is not None
        return a[index], b[:, index]

    def freeze_except(self, trained: Collection[int] | None) -> None:
        """Train some experts and freeze the others; the values do not change.

        Parameters are replaced where experts of both kinds exist, or existed before. The trained
        ones require gradients afterwards.

        Args:
            trained: the indices of the trained experts; `None` for all experts.
        """
        experts = range(self.num_experts)
        kept = None if trained is None or set(trained) >= set(experts) else tuple(sorted(trained))
        if kept != self.trained_experts and (kept or self.is_split):
            self._store(self.lora_A.detach(), self.lora_B.detach(), kept)
        self.trained_experts = kept
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        self.keep_frozen()

    def keep_frozen(self) -> None:
        """Freeze the frozen experts again, after `requires_grad` of all parameters was set."""
        for name, parameter in self.named_parameters():
            if name.endswith(FROZEN) or self.trained_experts == ():
                parameter.requires_grad_(False)

    def replace_factors(
        self, lora_A: Tensor, lora_B: Tensor, trained: Collection[int] | None
    ) -> None:
        """Replace the factors by those of other experts, with the same `requires_grad`.

        Args:
            lora_A: `(E, r, *in_shape)`.
            lora_B: `(out, E, r)`.
            trained: the indices of the trained experts; `None` for all experts.
        """
        requires_grad = any(p.requires_grad for p in self.parameters())
        if self.trained_experts == ():
            requires_grad = bool(trained)
        self._store(lora_A, lora_B, None if trained is None else tuple(sorted(trained)))
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        self.keep_frozen()

    def join_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict of this module with whole factors.

        Args:
            state: the state dict; factors without both parts stay as they are.
        """
        joined = dict(state)
        for name in EXPERT_DIMENSION if self._runs else ():
            parts = {name + part: joined.pop(name + part, None) for part in (TRAINED, FROZEN)}
            found = {key: tensor for key, tensor in parts.items() if tensor is not None}
            joined |= {name: self._join(name, found)} if len(found) == len(parts) else found
        return joined

    def split_state(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return an entry of a state dict with whole factors as entries of this module's.

        Args:
            name: the key in this module.
            tensor: the value.
        """
        if not self._runs or name not in EXPERT_DIMENSION:
            return {name: tensor}
        dim = EXPERT_DIMENSION[name]
        if tensor.ndim <= dim or tensor.shape[dim] != self.num_experts:
            return {name + TRAINED: tensor}  # `load_state_dict` raises for its shape
        return {name + part: self._take(tensor, part, dim) for part in (TRAINED, FROZEN)}

    def _store(self, lora_A: Tensor, lora_B: Tensor, trained: tuple[int, ...] | None) -> None:
        for name in list(self._parameters):
            del self._parameters[name]
        experts = lora_A.shape[EXPERT_DIMENSION["lora_A"]]
        self.trained_experts = None if trained is not None and len(trained) == experts else trained
        self._runs = _find_runs(self.trained_experts, experts) if self.trained_experts else ()
        for name, whole in (("lora_A", lora_A), ("lora_B", lora_B)):
            for part in (TRAINED, FROZEN) if self._runs else ("",):
                tensor = self._take(whole, part, EXPERT_DIMENSION[name]) if part else whole
                self.register_parameter(name + part, nn.Parameter(tensor.clone()))

    def _take(self, whole: Tensor, part: str, dim: int) -> Tensor:
        taken, first = [], 0
        for run in self._runs:
            if run.part == part:
                taken.append(whole.narrow(dim, first, run.length))
            first += run.length
        return torch.cat(taken, dim)

    def _join(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        dim = EXPERT_DIMENSION[name]
        pieces = [parts[name + run.part].narrow(dim, run.start, run.length) for run in self._runs]
        return torch.cat(pieces, dim)

    def _locate(self, index: int) -> tuple[str, int]:
        first = 0
        for run in self._runs:
            if index < first + run.length:
                return run.part, run.start + index - first
            first += run.length
        return "", index


def _find_runs(trained: Collection[int], experts: int) -> tuple[_Run, ...]:
    runs, starts = [], {TRAINED: 0, FROZEN: 0}
    parts = (TRAINED if index in trained else FROZEN for index in range(experts))
    for part, neighbors in groupby(parts):
        length = len(list(neighbors))
        runs.append(_Run(part, starts[part], length))
        starts[part] += length
    return tuple(runs)
