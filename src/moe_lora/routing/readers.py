"""Read what a router needs off the call of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.masks import MaskInfo, analyze, from_flux_fill, from_inpainting_unet
from moe_lora.routing.inputs import RouterInputs

FLUX_FILL_CHANNELS, FLUX_FILL_MASK_CHANNELS = 384, 256
INPAINTING_UNET_CHANNELS = 9


def visual_channels(model: nn.Module) -> int | None:
    """Return the width of the tokens that `read_inputs` makes of the model's calls, if known.

    Args:
        model: a diffusers-style model with `config.in_channels`.
    """
    channels: int | None = getattr(getattr(model, "config", None), "in_channels", None)
    if channels == FLUX_FILL_CHANNELS:
        return channels - FLUX_FILL_MASK_CHANNELS
    if channels == INPAINTING_UNET_CHANNELS:
        return channels - 1
    return channels


def read_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of `model(*args, **kwargs)` by parameter name."""
    signature = inspect.signature(type(model).forward)
    arguments = dict(signature.bind_partial(model, *args, **kwargs).arguments)
    arguments.pop(next(iter(signature.parameters)), None)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


def read_inputs(
    model: nn.Module,
    arguments: Mapping[str, Any],
    *,
    mask_info: MaskInfo | None = None,
    task_hint: str | None = None,
    grid_size: tuple[int, int] | None = None,
) -> RouterInputs:
    """Make router inputs of a model's arguments.

    FLUX Fill (384 input channels) and 9-channel inpainting UNets carry their mask, which is
    recovered and split off. What the caller gives wins over what the call carries.

    Args:
        model: the adapted model.
        arguments: the call's arguments by name.
        mask_info: the caller's mask, analysed.
        task_hint: the caller's hint.
        grid_size: the caller's `(rows, columns)` of the tokens.

    Returns:
        The inputs, with images of the model's latent space flattened to tokens.

    Raises:
        ValueError: when the call holds no tensor to read, or the sizes contradict each other.
    """
    hidden = _hidden_states(arguments)
    channels = getattr(getattr(model, "config", None), "in_channels", None)
    if hidden.ndim == 4:
        grid_size = (hidden.shape[2], hidden.shape[3])
        if channels == INPAINTING_UNET_CHANNELS:
            mask_info = mask_info or analyze(from_inpainting_unet(hidden))
            hidden = torch.cat([hidden[:, :4], hidden[:, 5:]], dim=1)
        hidden = hidden.flatten(2).transpose(1, 2)
    elif hidden.ndim == 2:
        hidden = hidden.unsqueeze(1)
    else:
        grid_size = grid_size or _grid_of_ids(arguments.get("img_ids"), hidden)
        if channels == FLUX_FILL_CHANNELS:
            if mask_info is None:
                rows, columns = _known(grid_size)
                mask_info = analyze(from_flux_fill(hidden, 16 * rows, 16 * columns))
            hidden = hidden[..., :-FLUX_FILL_MASK_CHANNELS]
    return RouterInputs(
        hidden_states=hidden,
        mask_info=None if mask_info is None else _match_batch(mask_info, hidden),
        timestep=_timestep(arguments.get("timestep"), hidden),
        task_hint=task_hint,
        grid_size=grid_size,
        model_inputs=arguments,
    )


def _hidden_states(arguments: Mapping[str, Any]) -> Tensor:
    named = [arguments.get(name) for name in ("hidden_states", "sample")]
    for value in [*named, *arguments.values()]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (2, 3, 4):
            return value
    raise ValueError(
        "Expected the model to be called with a floating-point tensor of 2, 3 or 4 dimensions for "
        f"the router to read, but got the arguments {sorted(arguments)}."
    )


def _grid_of_ids(img_ids: Tensor | None, hidden: Tensor) -> tuple[int, int] | None:
    # FLUX numbers its tokens: img_ids[..., 1] is the row, img_ids[..., 2] the column.
    if img_ids is None:
        return None
    last = img_ids.reshape(-1, img_ids.shape[-1])[:, 1:3].amax(dim=0)
    rows, columns = (int(index) + 1 for index in last.tolist())
    if rows * columns != hidden.shape[1]:
        raise ValueError(
            f"Expected `img_ids` to number the {hidden.shape[1]} image tokens, but got {rows} rows "
            f"of {columns}. Give the grid with moe_lora.set_router_inputs(model, grid_size=...)."
        )
    return rows, columns


def _known(grid_size: tuple[int, int] | None) -> tuple[int, int]:
    if grid_size is None:
        raise ValueError(
            "Expected `img_ids` in the call, from which the token grid is read, but got none. Give "
            "the grid with moe_lora.set_router_inputs(model, grid_size=(rows, columns))."
        )
    return grid_size


def _timestep(timestep: Any, hidden: Tensor) -> Tensor | None:
    if timestep is None:
        return None
    values = torch.as_tensor(timestep, device=hidden.device).reshape(-1)
    return values.expand(hidden.shape[0]) if values.numel() == 1 else values


def _match_batch(info: MaskInfo, hidden: Tensor) -> MaskInfo:
    given, needed = info.mask.shape[0], hidden.shape[0]
    if given == needed:
        return info
    if given != 1:
        raise ValueError(
            f"Expected router inputs for {needed} samples (or for one, which then serves all), but "
            f"got a mask for {given}."
        )
    tensors = {f.name: getattr(info, f.name) for f in fields(info)}
    return replace(
        info,
        **{k: v.expand(needed, *v.shape[1:]) for k, v in tensors.items() if v is not None},
    )
