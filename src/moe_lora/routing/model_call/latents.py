"""The latents and the timestep of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_lora.families import VideoAxes

_LATENT_NAMES = ("hidden_states", "sample", "x")
_TIMESTEP_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")


def named_latents(arguments: Mapping[str, Any]) -> Tensor | list[Tensor] | None:
    """Return the latents with a known argument name.

    Args:
        arguments: the call's arguments by name.

    Returns:
        One tensor, or one tensor per sample for a list. Of a list of lists, the last tensor of each
        sample, after its references. `None` when no argument has a known name.
    """
    for name in _LATENT_NAMES:
        found = _samples(arguments.get(name))
        if found is not None:
            return found
    return None


def router_latents(arguments: Mapping[str, Any]) -> Tensor:
    """Return the latents for a router: the named latents, or the first floating-point tensor.

    Args:
        arguments: the call's arguments by name.

    Returns:
        `(B, ...)` with 2 to 5 dimensions; lists of samples are stacked.

    Raises:
        ValueError: when there is no floating-point tensor with at least 2 dimensions, or the
            samples of a list have different sizes.
    """
    named = [arguments.get(name) for name in _LATENT_NAMES]
    for value in [*named, *arguments.values()]:
        found = _samples(value)
        tensor = stack_samples(found) if isinstance(found, list) else found
        if tensor is not None and tensor.is_floating_point() and tensor.ndim >= 2:
            return tensor if tensor.ndim <= 5 else tensor.flatten(2)
    raise ValueError(
        "Expected the model to be called with a floating-point tensor of at least 2 dimensions, as "
        f"the latents for the router, but got the arguments {sorted(arguments)}."
    )


def stack_samples(samples: list[Tensor]) -> Tensor:
    """Stack the samples of a list.

    Args:
        samples: tensors of one shape.

    Raises:
        ValueError: when the shapes differ.
    """
    if len({sample.shape for sample in samples}) > 1:
        raise ValueError(
            "Expected samples of one size for the router, but got the sizes "
            f"{[tuple(sample.shape) for sample in samples]}. Call the model once per size, or set "
            "the weights with moe_lora.route(model, weights)."
        )
    return torch.stack(samples)


def average_frames(latents: Tensor, axes: VideoAxes) -> Tensor:
    """Average a video over its frames.

    Args:
        latents: 5 dimensions in the order of `axes`; others are returned unchanged.
        axes: the order of the dimensions.

    Returns:
        `(B, C, h, w)` for a video.
    """
    if latents.ndim != 5:
        return latents
    if axes == "channels_last":
        return latents.mean(dim=1).movedim(-1, 1)
    return latents.mean(dim=1 if axes == "frames_first" else 2)


def find_timestep(arguments: Mapping[str, Any], like: Tensor) -> Tensor | None:
    """Return the timestep of every sample.

    Args:
        arguments: the call's arguments by name.
        like: `(B, ...)`, a tensor with the batch size and device of the result.

    Returns:
        `(B,)`; `None` when the call has no timestep.
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
    # Conditioning frames or tokens have a lower noise level than generated ones.
    return values.flatten(1).amax(dim=1)


def _samples(value: Any) -> Tensor | list[Tensor] | None:
    if isinstance(value, list) and value:
        samples = [item[-1] if isinstance(item, list) and item else item for item in value]
        return samples if all(isinstance(sample, Tensor) for sample in samples) else None
    return value if isinstance(value, Tensor) and value.ndim else None
