"""The latents of a call, and its timestep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lora.families import VideoAxes

_LATENT_NAMES = ("hidden_states", "sample", "x")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")


def named_latents(arguments: Mapping[str, Any]) -> Tensor | list[Tensor] | None:
    """Return the latents that stand under a known name.

    Args:
        arguments: the call's arguments by name.

    Returns:
        One tensor, or one tensor per sample where the call has a list (of lists: their last
        tensors, those before are references); None where no argument has a known name.
    """
    for name in _LATENT_NAMES:
        found = _samples(arguments.get(name))
        if found is not None:
            return found
    return None


def readable_latents(arguments: Mapping[str, Any]) -> Tensor:
    """Return the latents for a router: the named ones, or else the first floating-point tensor.

    Args:
        arguments: the call's arguments by name.

    Returns:
        `(B, ...)` with 2 to 5 dimensions; lists of samples are stacked.

    Raises:
        ValueError: there is no floating-point tensor of 2 dimensions or more, or a list holds
            samples of different sizes.
    """
    named = [arguments.get(name) for name in _LATENT_NAMES]
    for value in [*named, *arguments.values()]:
        found = _samples(value)
        tensor = stacked(found) if isinstance(found, list) else found
        if tensor is not None and tensor.is_floating_point() and tensor.ndim >= 2:
            return tensor if tensor.ndim <= 5 else tensor.flatten(2)
    raise ValueError(
        "Expected the model to be called with a floating-point tensor of 2 dimensions or more for "
        f"the router to read, but got the arguments {sorted(arguments)}."
    )


def stacked(samples: list[Tensor]) -> Tensor:
    """Stack the samples of a list.

    Args:
        samples: tensors of one shape.

    Raises:
        ValueError: the shapes differ.
    """
    if len({sample.shape for sample in samples}) > 1:
        raise ValueError(
            "Expected samples of one size for the router to read, but got the sizes "
            f"{[tuple(sample.shape) for sample in samples]}. Call the model once for each "
            "size, or route by hand with moe_lora.route(model, weights)."
        )
    return torch.stack(samples)


def one_image(latents: Tensor, axes: VideoAxes) -> Tensor:
    """Average a video over its frames.

    Args:
        latents: 5 dimensions in the order of `axes`; others are returned as they are.
        axes: the order.

    Returns:
        `(B, C, h, w)` of a video.
    """
    if latents.ndim != 5:
        return latents
    if axes == "channels_last":
        return latents.mean(dim=1).movedim(-1, 1)
    return latents.mean(dim=1 if axes == "frames_first" else 2)


def timestep_of(arguments: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """Return the timestep of every sample.

    Args:
        arguments: the call's arguments by name.
        like: `(B, ...)`; its batch and device are the result's.

    Returns:
        `(B,)`; None where the call has no timestep.
    """
    given = (arguments.get(name) for name in _TIMESTEP_NAMES)
    timestep = next((value for value in given if value is not None), None)
    if timestep is None:
        return None
    values, batch = torch.as_tensor(timestep, device=like.device), like.shape[0]
    if values.numel() == 1:
        return values.reshape(1).expand(batch)
    if values.shape[0] != batch or values.ndim == 1:
        return values.reshape(-1)
    # Frames or tokens that are given are at an earlier timestep than those that are made.
    return values.flatten(1).amax(dim=1)


def _samples(value: Any) -> Tensor | list[Tensor] | None:
    if isinstance(value, list) and value:
        samples = [item[-1] if isinstance(item, list) and item else item for item in value]
        return samples if all(isinstance(sample, Tensor) for sample in samples) else None
    return value if isinstance(value, Tensor) and value.ndim else None
