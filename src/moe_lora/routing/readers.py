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
_INPUT_NAMES = ("hidden_states", "sample", "x")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")
_CHANNEL_NAMES = ("in_channels", "in_visual_dim", "in_dim", "io_channels")
_CHANNELS_LAST = ("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel")
_REFERENCES_FIRST = ("QwenImage21Transformer2DModel",)
_FRAMES_FIRST = (
    "AnyFlowTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "ConsisIDTransformer3DModel",
    "UNetSpatioTemporalConditionModel",
)


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
) -> RouterInputs:
    """Make router inputs of a model's arguments.

    FLUX Fill (384 input channels) and 9-channel inpainting UNets carry their mask, which is
    recovered and split off. What the caller gives wins over what the call carries.

    Images of the model's latent space become one token per latent pixel. Videos are averaged over
    their frames: a mask is one picture, which holds for every frame. Of packed tokens, those that
    follow the image as its references are left out, when the call numbers its tokens.

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
    hidden = _one_picture(_hidden_states(arguments), model)
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
        hidden, grid_size = _tokens_of_image(arguments, hidden, model)
    if channels == FLUX_FILL_CHANNELS and hidden.shape[-1] == channels:
        if mask_info is None:
            rows, columns = _known(grid_size)
            mask_info = analyze(from_flux_fill(hidden, 16 * rows, 16 * columns))
        hidden = hidden[..., :-FLUX_FILL_MASK_CHANNELS]
    return RouterInputs(
        hidden_states=hidden,
        mask_info=None if mask_info is None else _match_batch(mask_info, hidden),
        timestep=_timestep(arguments, hidden),
        task_hint=task_hint,
        grid_size=grid_size,
        model_inputs=arguments,
    )


def _input_channels(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _CHANNEL_NAMES)
    return next((value for value in found if value is not None), None)


def _hidden_states(arguments: Mapping[str, Any]) -> Tensor:
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
    if names.intersection(_CHANNELS_LAST):
        return hidden.mean(dim=1).movedim(-1, 1)
    return hidden.mean(dim=1 if names.intersection(_FRAMES_FIRST) else 2)


def _tokens_of_image(
    arguments: Mapping[str, Any], hidden: Tensor, model: nn.Module
) -> tuple[Tensor, tuple[int, int] | None]:
    """Return the tokens of the image to be made and their grid, as far as the call tells."""
    if arguments.get("img_ids") is not None:
        return _numbered_tokens(arguments["img_ids"], hidden)
    last = type(model).__name__ in _REFERENCES_FIRST
    shape = _shape_of_image(arguments, -1 if last else 0)
    if shape is None:
        return hidden, None
    frames, rows, columns = shape
    tokens = frames * rows * columns
    if tokens > hidden.shape[1]:
        raise ValueError(
            f"Expected {frames} * {rows} * {columns} image tokens (frames, rows, columns), as the "
            f"call says, but got {hidden.shape[1]}."
        )
    image = hidden[:, -tokens:] if last else hidden[:, :tokens]
    return image.unflatten(1, (frames, rows * columns)).mean(dim=1), (rows, columns)


def _shape_of_image(arguments: Mapping[str, Any], place: int) -> tuple[int, int, int] | None:
    # Qwen-Image: (frames, rows, columns) of every image of every sample. LTX: three arguments.
    shapes = arguments.get("img_shapes")
    if shapes is None:
        shapes = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
        return None if None in shapes else (int(shapes[0]), int(shapes[1]), int(shapes[2]))
    samples = shapes if isinstance(shapes, list) else [shapes]
    own = {tuple(images[place]) if isinstance(images, list) else images for images in samples}
    if len(own) > 1:
        raise ValueError(
            f"Expected images of one size for the router to read, but got `img_shapes` {shapes}. "
            "Call the model once for each size, or route by hand with "
            "moe_lora.route(model, weights)."
        )
    frames, rows, columns = own.pop()
    return int(frames), int(rows), int(columns)


def _numbered_tokens(ids: Tensor, hidden: Tensor) -> tuple[Tensor, tuple[int, int]]:
    # FLUX numbers its tokens: ids[..., 1] is the row, ids[..., 2] the column; ids[..., 0] tells
    # the reference images that follow from the image.
    ids = ids[0] if ids.ndim == 3 else ids
    same = (ids[:, 0] == ids[0, 0]).long()
    image = ids[: int(same.cumprod(0).sum())]
    rows, columns = (int(index) + 1 for index in image[:, 1:3].amax(dim=0).tolist())
    if rows * columns != len(image) or len(ids) != hidden.shape[1]:
        raise ValueError(
            f"Expected `img_ids` to number the {hidden.shape[1]} image tokens, but got {rows} rows "
            f"of {columns}. Give the grid with moe_lora.set_router_inputs(model, grid_size=...)."
        )
    return hidden[:, : len(image)], (rows, columns)


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
