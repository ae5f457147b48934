"""The inputs of a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_lora.masks import MaskInfo


@dataclass(frozen=True)
class GivenInputs:
    """Router inputs given by the caller; see `moe_lora.set_router_inputs`."""

    mask_info: MaskInfo | None = None
    task_hint: str | Sequence[str | None] | None = None
    grid_size: tuple[int, int] | None = None
    timestep_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class RouterInputs:
    """Inputs of a router, from one call of the adapted model.

    Args:
        hidden_states: `(B, T, D)`, the visual tokens of the call without mask channels. For FLUX
            Fill these are the 64 noisy and the 64 masked-image channels.
        mask_info: the analyzed mask of every sample, or `None` without a mask.
        timestep: `(B,)`, the model's timestep argument (FLUX: sigma in [0, 1]), or `None`.
        task_hint: a hint such as `"removal_focus"`, one hint or `None` per sample, or `None`.
        grid_size: `(rows, columns)` of the `T` tokens, or `None` when the call does not determine
            it.
        model_inputs: all arguments of the call by parameter name, for custom routers (for example
            `pooled_projections`).
        timestep_range: the timesteps `(clean, noise)` of clean data and of pure noise: `(0, 1)` for
            FLUX, `(0, 1000)` for UNets and SD3, `(1, 0)` for Z-Image. `None` when neither the
            model's family nor `set_router_inputs` defines it.
    """

    hidden_states: Tensor
    mask_info: MaskInfo | None = None
    timestep: Tensor | None = None
    task_hint: str | Sequence[str | None] | None = None
    grid_size: tuple[int, int] | None = None
    model_inputs: Mapping[str, Any] = field(default_factory=dict)
    timestep_range: tuple[float, float] | None = None

    @property
    def batch_size(self) -> int:
        """Return the number of samples `B`."""
        return self.hidden_states.shape[0]

    def require_grid_size(self) -> tuple[int, int]:
        """Return `grid_size`, or raise when it is unknown.

        Raises:
            ValueError: when `grid_size` is `None`, or has another number of tokens.
        """
        tokens = self.hidden_states.shape[1]
        if self.grid_size is None:
            raise ValueError(
                "Expected `grid_size`, the (rows, columns) of the tokens, but the call does not "
                "determine it. Set it with "
                "moe_lora.set_router_inputs(model, mask=mask, grid_size=(rows, columns))."
            )
        if self.grid_size[0] * self.grid_size[1] != tokens:
            raise ValueError(
                f"Expected `grid_size` to have {tokens} tokens, but got {tuple(self.grid_size)}."
            )
        return self.grid_size

    @property
    def sigma(self) -> Tensor:
        """Return the noise level of every sample, in the same unit for all models.

        sigma = (timestep - clean) / (noise - clean), with `(clean, noise)` of `timestep_range`. It
        is the flow's sigma for rectified-flow models, and the remaining share of the schedule for
        others.

        Returns:
            `(B,)`, in [0, 1]; float32, or float64 for float64 timesteps.

        Raises:
            ValueError: when the call has no timestep, the range is unknown, or a timestep is
                outside the range.

        Example:
            >>> latents, steps = torch.zeros(2, 4, 8), torch.tensor([250, 999])
            >>> RouterInputs(latents, timestep=steps, timestep_range=(0, 1000)).sigma
            tensor([0.2500, 0.9990])
        """
        if self.timestep is None:
            raise ValueError(
                "Expected the model to be called with a timestep, for the noise level of the "
                f"router, but got the arguments {sorted(self.model_inputs)}."
            )
        if self.timestep_range is None:
            raise ValueError(
                "Expected a known `timestep_range`, for the noise level of the router, but the "
                "model's family is unknown. Set the timesteps of clean data and of pure noise with "
                "moe_lora.set_router_inputs(model, "
                "timestep_range=(clean, noise)): (0, 1) for a flow's sigma, (0, 1000) for the "
                "steps of most schedulers."
            )
        clean, noise = self.timestep_range
        steps = self.timestep.to(torch.promote_types(self.timestep.dtype, torch.float32))
        lowest, highest = torch.stack(steps.aminmax()).tolist() if len(steps) else (clean, noise)
        lies_within = min(clean, noise) <= lowest and highest <= max(clean, noise)
        if len(steps) and not lies_within:
            raise ValueError(
                f"Expected timesteps from {clean:g} (clean) to {noise:g} (noise), but got values "
                f"from {lowest:g} to {highest:g}."
            )
        return (steps - clean) / (noise - clean)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RouterInputs:
        """Return the same inputs with the tensors on another device.

        Args:
            device: the device of `hidden_states`, `mask_info` and `timestep`; `model_inputs` stay.
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
