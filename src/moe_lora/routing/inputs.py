"""What a router reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_lora.masks import MaskInfo


@dataclass(frozen=True)
class GivenInputs:
    """What the caller gave for the router to read; see `moe_lora.set_router_inputs`."""

    mask_info: MaskInfo | None = None
    task_hint: str | None = None
    grid_size: tuple[int, int] | None = None
    timestep_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class RouterInputs:
    """Inputs of a router: what is known about one call of the adapted model.

    Args:
        hidden_states: `(B, T, D)`, the visual tokens that the model was called with, mask channels
            split off. For FLUX Fill these are the 64 noisy and the 64 masked-image channels.
        mask_info: the analyzed mask of every sample, or `None` when no mask is known.
        timestep: `(B,)`, as the model was given it (FLUX: sigma in [0, 1]), or `None`.
        task_hint: a hint such as `"removal_focus"`, or `None`.
        grid_size: `(rows, columns)` of the `T` tokens, or `None` when the call does not tell.
        model_inputs: every argument of the call by its parameter name, for routers that read more
            (for example `pooled_projections`).
        timestep_range: the timesteps of clean data and of pure noise in the model's own counting:
            `(0, 1)` for FLUX, `(0, 1000)` for UNets and SD3, `(1, 0)` for Z-Image. `None` when it
            is known neither of the model's family nor from `set_router_inputs`.
    """

    hidden_states: Tensor
    mask_info: MaskInfo | None = None
    timestep: Tensor | None = None
    task_hint: str | None = None
    grid_size: tuple[int, int] | None = None
    model_inputs: Mapping[str, Any] = field(default_factory=dict)
    timestep_range: tuple[float, float] | None = None

    @property
    def batch_size(self) -> int:
        """Return the number of samples `B`."""
        return self.hidden_states.shape[0]

    def known_grid(self) -> tuple[int, int]:
        """Return `grid_size`, for a router that cannot do without.

        Raises:
            ValueError: when it is unknown, or does not give the number of tokens.
        """
        tokens = self.hidden_states.shape[1]
        if self.grid_size is None:
            raise ValueError(
                "Expected `grid_size`, the (rows, columns) of the tokens, to be known, but the "
                "call does not tell. Give it with "
                "moe_lora.set_router_inputs(model, mask=mask, grid_size=(rows, columns))."
            )
        if self.grid_size[0] * self.grid_size[1] != tokens:
            raise ValueError(
                f"Expected `grid_size` to give {tokens} tokens, but got {tuple(self.grid_size)}."
            )
        return self.grid_size

    @property
    def sigma(self) -> Tensor:
        """Return how much of every sample is noise, whatever the model counts its timesteps in.

        sigma = (timestep - clean) / (noise - clean), with `(clean, noise)` of `timestep_range`. It
        is the flow's sigma for models of rectified flow, and the share of the schedule that is yet
        to be denoised for others.

        Returns:
            `(B,)`, in [0, 1]; float32, or float64 for float64 timesteps.

        Raises:
            ValueError: when the call has no timestep, or one outside of the range, or when the
                range is unknown.

        Example:
            >>> latents, steps = torch.zeros(2, 4, 8), torch.tensor([250, 999])
            >>> RouterInputs(latents, timestep=steps, timestep_range=(0, 1000)).sigma
            tensor([0.2500, 0.9990])
        """
        if self.timestep is None:
            raise ValueError(
                "Expected the model to be called with a timestep, of which the router makes a "
                f"noise level, but got the arguments {sorted(self.model_inputs)}."
            )
        if self.timestep_range is None:
            raise ValueError(
                "Expected the range of the timesteps to be known, of which the router makes a "
                "noise level, but the model's family is unknown. Give the timesteps of clean data "
                "and of pure noise with moe_lora.set_router_inputs(model, "
                "timestep_range=(clean, noise)): (0, 1) for a flow's sigma, (0, 1000) for the "
                "steps of most schedulers."
            )
        clean, noise = self.timestep_range
        steps = self.timestep.to(torch.promote_types(self.timestep.dtype, torch.float32))
        lowest, highest = torch.stack(steps.aminmax()).tolist() if len(steps) else (clean, noise)
        lies_within = min(clean, noise) <= lowest and highest <= max(clean, noise)
        if len(steps) and not lies_within:
            raise ValueError(
                f"Expected timesteps from {clean:g} (clean) to {noise:g} (noise), as the model "
                f"counts them, but got values from {lowest:g} to {highest:g}."
            )
        return (steps - clean) / (noise - clean)

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
