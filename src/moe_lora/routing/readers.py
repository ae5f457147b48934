"""Read what a router needs off the call of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.families import timestep_range
from moe_lora.masks import MaskInfo, analyze, from_flux_fill, from_inpainting_unet
from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.placement import CHANNELS_LAST, FRAMES_FIRST, image_tokens, sample_index

FLUX_FILL_CHANNELS, FLUX_FILL_MASK_CHANNELS = 384, 256
INPAINTING_UNET_CHANNELS = 9
_INPUT_NAMES = ("hidden_states", "sample", "x")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")
_CHANNEL_NAMES = ("in_channels", "in_visual_dim", "in_dim", "io_channels")


def visual_channels(model: nn.Module) -> int | None:
    """Return the width of the tokens that `read_inputs` makes of the model's calls, if known.

    Args:
        model: a diffusers-style model whose config tells its input channels.
    """
    channels = _input_channels(model)
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
    analyze: Callable[[Tensor], MaskInfo] = analyze,
) -> RouterInputs:
    """Make router inputs of a model's arguments.

    FLUX Fill (384 input channels) and 9-channel inpainting UNets carry their mask, which is
    recovered and split off. What the caller gives wins over what the call carries.

    Images of the model's latent space become one token per latent pixel. Videos are averaged over
    their frames: a mask is one picture, which holds for every frame. Of packed tokens, those that
    follow the image as its references are left out, when the call numbers its tokens. A mask for
    fewer samples than the call has goes to those that it is for; see
    `moe_lora.routing.placement.sample_index`.

    Args:
        model: the adapted model.
        arguments: the call's arguments by name.
        mask_info: the caller's mask, analysed.
        task_hint: the caller's hint.
        grid_size: the caller's `(rows, columns)` of the tokens.
        analyze: what makes a `MaskInfo` of a mask that the call carries.

    Returns:
        The inputs, with images of the model's latent space flattened to tokens.

    Raises:
        ValueError: when the call holds no tensor to read, or the sizes contradict each other.
    """
    latents = read_latents(arguments)
    hidden = _one_picture(latents, model)
    channels = _input_channels(model)
    if hidden.ndim == 4:
        grid_size = (hidden.shape[2], hidden.shape[3])
        if channels == INPAINTING_UNET_CHANNELS:
            mask_info = mask_info or analyze(from_inpainting_unet(hidden))
            hidden = torch.cat([hidden[:, :4], hidden[:, 5:]], dim=1)
        hidden = hidden.flatten(2).transpose(1, 2)
    elif hidden.ndim == 2:
        hidden = hidden.unsqueeze(1)
    elif hidden.shape[1] == channels != hidden.shape[2]:
        hidden = hidden.transpose(1, 2)
    elif grid_size is None:
        image = image_tokens(arguments, hidden.shape[1], model)
        if image is not None:
            hidden, grid_size = image.one_picture(hidden), image.grid
    if channels == FLUX_FILL_CHANNELS and hidden.shape[-1] == channels:
        if mask_info is None:
            rows, columns = _known(grid_size)
            mask_info = analyze(from_flux_fill(hidden, 16 * rows, 16 * columns))
        hidden = hidden[..., :-FLUX_FILL_MASK_CHANNELS]
    timestep = _timestep(arguments, hidden)
    return RouterInputs(
        hidden_states=hidden,
        mask_info=None if mask_info is None else _match_samples(mask_info, latents, arguments),
        timestep=timestep,
        timestep_range=_timestep_range(timestep, model),
        task_hint=task_hint,
        grid_size=grid_size,
        model_inputs=arguments,
    )


def latents_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the latents that a model is called with, if they are one named tensor."""
    named = (arguments.get(name) for name in _INPUT_NAMES)
    return next((value for value in named if isinstance(value, Tensor)), None)


def _input_channels(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _CHANNEL_NAMES)
    return next((value for value in found if value is not None), None)


def read_latents(arguments: Mapping[str, Any]) -> Tensor:
    """Return what a model is called with, lists of samples stacked.

    Raises:
        ValueError: when there is no floating-point tensor, or a list of different sizes.
    """
    named = [arguments.get(name) for name in _INPUT_NAMES]
    for value in [*named, *arguments.values()]:
        tensor = _stacked(value)
        if tensor is not None and tensor.is_floating_point() and tensor.ndim >= 2:
            return tensor if tensor.ndim <= 5 else tensor.flatten(2)
    raise ValueError(
        "Expected the model to be called with a floating-point tensor of 2 dimensions or more for "
        f"the router to read, but got the arguments {sorted(arguments)}."
    )


def _stacked(value: Any) -> Tensor | None:
    """Return a tensor, or one made of a list of samples (each of them a list: its last one)."""
    if isinstance(value, list) and value:
        samples = [item[-1] if isinstance(item, list) and item else item for item in value]
        if not all(isinstance(sample, Tensor) for sample in samples):
            return None
        if len({sample.shape for sample in samples}) > 1:
            raise ValueError(
                "Expected samples of one size for the router to read, but got the sizes "
                f"{[tuple(sample.shape) for sample in samples]}. Call the model once for each "
                "size, or route by hand with moe_lora.route(model, weights)."
            )
        return torch.stack(samples)
    return value if isinstance(value, Tensor) else None


def _one_picture(hidden: Tensor, model: nn.Module) -> Tensor:
    """Average `(B, C, F, h, w)` over its frames; some models order the dimensions differently."""
    if hidden.ndim != 5:
        return hidden
    names = {cls.__name__ for cls in type(model).__mro__}
    if names.intersection(CHANNELS_LAST):
        return hidden.mean(dim=1).movedim(-1, 1)
    return hidden.mean(dim=1 if names.intersection(FRAMES_FIRST) else 2)


def _known(grid_size: tuple[int, int] | None) -> tuple[int, int]:
    if grid_size is None:
        raise ValueError(
            "Expected `img_ids` in the call, from which the token grid is read, but got none. Give "
            "the grid with moe_lora.set_router_inputs(model, grid_size=(rows, columns))."
        )
    return grid_size


def _timestep(arguments: Mapping[str, Any], hidden: Tensor) -> Tensor | None:
    given = (arguments.get(name) for name in _TIMESTEP_NAMES)
    timestep = next((value for value in given if value is not None), None)
    if timestep is None:
        return None
    values = torch.as_tensor(timestep, device=hidden.device)
    batch = hidden.shape[0]
    if values.numel() == 1:
        return values.reshape(1).expand(batch)
    # Frames or tokens that are given are at an earlier timestep than those that are made.
    return values.reshape(batch, -1).amax(dim=1) if values.shape[0] == batch else values.reshape(-1)


def _timestep_range(timestep: Tensor | None, model: nn.Module) -> tuple[float, float] | None:
    known = timestep_range(model)
    if known is None and timestep is not None and not timestep.is_floating_point():
        return (0.0, 1000.0)
    return known


def _match_samples(info: MaskInfo, latents: Tensor, arguments: Mapping[str, Any]) -> MaskInfo:
    index = sample_index(info.mask.shape[0], latents, arguments)
    if index is None:
        return info
    tensors = {f.name: getattr(info, f.name) for f in fields(info)}
    return replace(info, **{k: v[index.to(v.device)] for k, v in tensors.items() if v is not None})
