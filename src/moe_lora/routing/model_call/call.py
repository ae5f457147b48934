"""One call of an adapted model, read once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    named_latents,
    one_image,
    readable_latents,
    timestep_of,
)
from moe_lora.routing.model_call.samples import sample_index

_FILL_PIXELS = 16


@dataclass(frozen=True, eq=False)
class ModelCall:
    """What one call of a model says. Every property is computed once, when it is first asked for.

    Args:
        model: the model that is called.
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
            model: the model that is called.
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
        """Return the latents that stand under a known name; `None` where none do."""
        return named_latents(self.arguments)

    @cached_property
    def latents(self) -> Tensor:
        """Return the latents for a router, as `readable_latents` finds them."""
        return readable_latents(self.arguments)

    @cached_property
    def image_tokens(self) -> ImageTokens | None:
        """Return the image's place among the packed tokens `(B, T, D)`, if the call says it."""
        return find_image_tokens(self.arguments, self.latents.shape[1], self.family.references)

    def router_inputs(
        self, given: GivenInputs | None = None, analyze: Callable[[Tensor], MaskInfo] = analyze
    ) -> RouterInputs:
        """Make the inputs of a router.

        FLUX Fill (384 input channels) and 9-channel inpainting UNets carry their mask, which is
        recovered and split off. What the caller gives wins over what the call carries.

        Images become one token per latent pixel. Videos are averaged over their frames, since one
        mask serves every frame. Packed tokens of references are left out where the call says which
        they are. For masks of fewer samples see `sample_index`.

        Args:
            given: what the caller gave by `set_router_inputs`.
            analyze: makes a `MaskInfo` of a mask that the call carries.

        Raises:
            ValueError: the call holds no tensor to read, or the sizes contradict each other.
        """
        given = given or GivenInputs()
        image = one_image(self.latents, self.family.video_axes)
        tokens, grid = self._visual_tokens(image, given.grid_size)
        info, carried = given.mask_info, self._carried_mask(tokens)
        if carried is not None:
            if info is None:
                info = analyze(_read_mask(carried, image, tokens, grid))
            tokens = _without_mask(tokens, carried)
        return RouterInputs(
            hidden_states=tokens,
            mask_info=None if info is None else self._match_mask(info),
            timestep=timestep_of(self.arguments, tokens),
            timestep_range=given.timestep_range or self.family.timestep_range,
            task_hint=given.task_hint,
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
            return self.image_tokens.one_image(image), self.image_tokens.grid
        return image, grid

    def _carried_mask(self, tokens: Tensor) -> CarriedMask | None:
        carried = self.family.carried_mask
        if carried is None or carried.channels != input_channels(self.model):
            return None
        return carried if tokens.shape[-1] == carried.channels else None

    def _match_mask(self, info: MaskInfo) -> MaskInfo:
        index = sample_index(info.mask.shape[0], self.latents)
        return info if index is None else info.select(index)


def _read_mask(carried: CarriedMask, image: Tensor, tokens: Tensor, grid: Grid | None) -> Tensor:
    if carried.encoding == "latent":
        return from_inpainting_unet(image)
    if grid is None:
        raise ValueError(
            "Expected `img_ids` in the call, from which the token grid is read, but got none. Give "
            "the grid with moe_lora.set_router_inputs(model, grid_size=(rows, columns))."
        )
    return from_flux_fill(tokens, _FILL_PIXELS * grid[0], _FILL_PIXELS * grid[1])


def _without_mask(tokens: Tensor, carried: CarriedMask) -> Tensor:
    before, after = tokens[..., : carried.first], tokens[..., carried.stop :]
    return torch.cat([before, after], dim=-1) if after.shape[-1] else before
