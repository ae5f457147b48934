"""One call of an adapted model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.families import CarriedMask, Family, family_of, input_channels
from moe_lora.masks import MaskInfo, analyze, from_flux_fill, from_inpainting_unet
from moe_lora.routing.inputs import GivenInputs, RouterInputs
from moe_lora.routing.model_call.arguments import named_arguments
from moe_lora.routing.model_call.image_tokens import Grid, ImageTokens, find_image_tokens
from moe_lora.routing.model_call.latents import (
    average_frames,
    find_timestep,
    named_latents,
    router_latents,
)
from moe_lora.routing.model_call.samples import sample_index

_FILL_PIXELS = 16


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One call of a model. Every property is computed once, at its first use.

    Args:
        model: the called model.
        arguments: the call's arguments by parameter name.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, hidden_states, timestep=None): ...
        >>> call = ModelCall.read(Model(), (torch.zeros(4, 6, 8),), {"timestep": 500})
        >>> call.latents.shape, call.router_inputs().timestep.shape
        (torch.Size([4, 6, 8]), torch.Size([4]))
    """

    model: nn.Module
    arguments: Mapping[str, Any]

    @classmethod
    def read(
        cls, model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> ModelCall:
        """Read the call `model(*args, **kwargs)`.

        Args:
            model: the called model.
            args: positional arguments.
            kwargs: keyword arguments.
        """
        return cls(model, named_arguments(model, args, kwargs or {}))

    @cached_property
    def family(self) -> Family:
        """Return the record of the model's family."""
        return family_of(self.model)

    @cached_property
    def named_latents(self) -> Tensor | list[Tensor] | None:
        """Return the latents with a known argument name, or `None`."""
        return named_latents(self.arguments)

    @cached_property
    def latents(self) -> Tensor:
        """Return the latents for a router; see `router_latents`."""
        return router_latents(self.arguments)

    @cached_property
    def image_tokens(self) -> ImageTokens | None:
        """Return the position of the image in the packed tokens `(B, T, D)`, if it is known."""
        return find_image_tokens(self.arguments, self.latents.shape[1], self.family.references)

    def router_inputs(
        self, given: GivenInputs | None = None, analyze: Callable[[Tensor], MaskInfo] = analyze
    ) -> RouterInputs:
        """Create the inputs of a router.

        The latents of FLUX Fill (384 input channels) and 9-channel inpainting UNets contain the
        mask: it is recovered, and its channels are removed. Inputs given by the caller override
        those of the call.

        Images become one token per latent pixel. Videos are averaged over their frames, since all
        frames share one mask. Packed tokens of references are excluded if the call identifies
        them. For masks of fewer samples see `sample_index`.

        Args:
            given: the caller's inputs, from `set_router_inputs`.
            analyze: computes the `MaskInfo` of a mask in the latents.

        Raises:
            ValueError: when the call has no tensor for a router, or contradictory sizes.
        """
        given = given or GivenInputs()
        image = average_frames(self.latents, self.family.video_axes)
        tokens, grid = self._visual_tokens(image, given.grid_size)
        info, carried = given.mask_info, self._carried_mask(tokens)
        if carried is not None:
            if info is None:
                info = analyze(_read_mask(carried, image, tokens, grid))
            tokens = _drop_mask_channels(tokens, carried)
        return RouterInputs(
            hidden_states=tokens,
            mask_info=None if info is None else self._expand_mask_info(info),
            timestep=find_timestep(self.arguments, tokens),
            timestep_range=given.timestep_range or self.family.timestep_range,
            task_hint=self._expand_task_hint(given.task_hint),
            grid_size=grid,
            model_inputs=self.arguments,
        )

    def _visual_tokens(self, image: Tensor, grid: Grid | None) -> tuple[Tensor, Grid | None]:
        """Return `(B, T, D)` tokens and their grid."""
        if image.ndim == 4:
            return image.flatten(2).transpose(1, 2), (image.shape[2], image.shape[3])
        if image.ndim == 2:
            return image.unsqueeze(1), grid
        if image.shape[1] == input_channels(self.model) != image.shape[2]:
            return image.transpose(1, 2), grid
        if grid is None and self.image_tokens is not None:
            return self.image_tokens.average_frames(image), self.image_tokens.grid
        return image, grid

    def _carried_mask(self, tokens: Tensor) -> CarriedMask | None:
        carried = self.family.carried_mask
        if carried is None or carried.channels != input_channels(self.model):
            return None
        return carried if tokens.shape[-1] == carried.channels else None

    def _expand_task_hint(
        self, hint: str | Sequence[str | None] | None
    ) -> str | Sequence[str | None] | None:
        if hint is None or isinstance(hint, str):
            return hint
        index = sample_index(len(hint), self.latents)
        return hint if index is None else tuple(hint[i] for i in index.tolist())

    def _expand_mask_info(self, info: MaskInfo) -> MaskInfo:
        index = sample_index(info.mask.shape[0], self.latents)
        return info if index is None else info.select(index)


def _read_mask(carried: CarriedMask, image: Tensor, tokens: Tensor, grid: Grid | None) -> Tensor:
    if carried.encoding == "latent":
        return from_inpainting_unet(image)
    if grid is None:
        raise ValueError(
            "Expected `img_ids` in the call, which determine the token grid, but got none. Set the "
            "grid with moe_lora.set_router_inputs(model, grid_size=(rows, columns))."
        )
    return from_flux_fill(tokens, _FILL_PIXELS * grid[0], _FILL_PIXELS * grid[1])


def _drop_mask_channels(tokens: Tensor, carried: CarriedMask) -> Tensor:
    before, after = tokens[..., : carried.first], tokens[..., carried.stop :]
    return torch.cat([before, after], dim=-1) if after.shape[-1] else before
