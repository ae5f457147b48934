"""A tiny model of a diffusers class, and one call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

BATCH = 3


@dataclass(frozen=True)
class Case:
    """Tiny model of one diffusers class, and one call of it.

    Args:
        cls: the name of the class in diffusers.
        config: its constructor's arguments.
        inputs: makes the arguments of a call for a number of samples.
        variant: tells several cases of one class apart.
        targets: name endings to adapt; None takes the class's default.
        router: what the router must be told: `input_dim`, `grid_size`.
        checkpointing: "none" where the class has none, "broken" where it fails without an adapter.
        idle: a regex of adapted layers that do not influence the output.
        apart: a regex of linear layers that have neither one row per sample nor a known layout.
    """

    cls: str
    config: Mapping[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    variant: str = ""
    targets: tuple[str, ...] | None = None
    router: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: Literal["yes", "none", "broken"] = "yes"
    idle: str | None = None
    apart: str | None = None

    @property
    def name(self) -> str:
        """Return the class's name with the variant's."""
        return f"{self.cls} ({self.variant})" if self.variant else self.cls

    @property
    def carries_mask(self) -> bool:
        """Return whether the call's latents hold the mask."""
        return self.config.get("in_channels") in (384, 9)


def one_of(value: Any, index: int, batch: int = BATCH) -> Any:
    """Return what one sample has of the arguments of a call for several."""
    if isinstance(value, Tensor):
        size = value.shape[0] if value.ndim else 0
        if size == 0 or size % batch or (value.ndim == 1 and size != batch):
            return value
        rows = size // batch
        return value[index * rows : (index + 1) * rows] if rows < 3 else value
    if isinstance(value, list):
        return [value[index]] if len(value) == batch else [one_of(v, index) for v in value]
    if isinstance(value, dict):
        return {name: one_of(v, index) for name, v in value.items()}
    return value


def normal(*shape: int) -> Tensor:
    """Return normal random numbers of the global generator."""
    return torch.randn(*shape)


def grid_ids(rows: int, columns: int, width: int = 3, first: int = 0) -> Tensor:
    """Return `(rows * columns, width)` position ids: `first`, row, column, zeros."""
    ids = torch.zeros(rows, columns, width)
    ids[..., 0] = first
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids.view(-1, width)


def times(batch: int) -> Tensor:
    """Return one timestep in [0, 1) per sample."""
    return torch.rand(batch)


def steps(batch: int) -> Tensor:
    """Return one integer timestep in [0, 10) per sample."""
    return torch.randint(0, 10, (batch,))


def ones(*shape: int) -> Tensor:
    """Return a mask that keeps everything."""
    return torch.ones(*shape)
