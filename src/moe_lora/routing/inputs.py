"""What a router reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_lora.masks import MaskInfo


@dataclass(frozen=True)
class RouterInputs:
    """Hold what is known about one call of the adapted model.

    Args:
        hidden_states: `(B, T, D)`, the visual tokens that the model was called with, mask channels
            split off. For FLUX Fill these are the 64 noisy and the 64 masked-image channels.
        mask_info: the analysed mask of every sample, or `None` when no mask is known.
        timestep: `(B,)`, as the model was given it (FLUX: sigma in [0, 1]), or `None`.
        task_hint: a hint such as `"removal_focus"`, or `None`.
        grid_size: `(rows, columns)` of the `T` tokens, or `None` when the call does not tell.
        model_inputs: every argument of the call by its parameter name, for routers that read more
            (for example `pooled_projections`).
    """

    hidden_states: Tensor
    mask_info: MaskInfo | None = None
    timestep: Tensor | None = None
    task_hint: str | None = None
    grid_size: tuple[int, int] | None = None
    model_inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        """Return the number of samples `B`."""
        return self.hidden_states.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RouterInputs:
        """Return the same inputs with the tensors on another device.

        Args:
            device: where to put `hidden_states`, `mask_info` and `timestep`; `model_inputs` stay.
            non_blocking: as in `torch.Tensor.to`; accelerate's offloading hooks pass it.
        """
        if self.hidden_states.device == torch.device(device):
            return self
        return replace(
            self,
            hidden_states=self.hidden_states.to(device, non_blocking=non_blocking),
            mask_info=None if self.mask_info is None else self.mask_info.to(device),
            timestep=None
            if self.timestep is None
            else self.timestep.to(device, non_blocking=non_blocking),
        )
