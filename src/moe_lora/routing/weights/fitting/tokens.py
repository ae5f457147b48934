"""Step 2: token weights for the tokens of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_lora.families import family_of
from moe_lora.routing.model_call.call import ModelCall
from moe_lora.routing.model_call.image_tokens import Grid, ImageTokens
from moe_lora.routing.weights.fitting.resampling import downsample, find_level, upsample


def fit_to_tokens(weights: Tensor, call: ModelCall) -> tuple[Tensor, Grid | None]:
    """Fit token weights to the tokens of the model.

    Args:
        weights: `(B, T, E)`.
        call: the model's call.

    Returns:
        The weights `(B, T', E)`, and the `(rows, columns)` of an image that the model may
        resample.

    Raises:
        ValueError: when the number of weights is not that of the image tokens of the call; or as
            `fit_to_latents`.
    """
    latents = call.latents
    if latents.ndim == 3 and weights.shape[1] != latents.shape[1]:
        tokens = call.image_tokens
        return weights if tokens is None else tokens.expand_weights(weights), None
    if latents.ndim in (4, 5):
        return fit_to_latents(weights, latents, call.model)
    return weights, None


def fit_to_latents(
    weights: Tensor, latents: Tensor, model: nn.Module
) -> tuple[Tensor, Grid | None]:
    """Fit token weights to unpacked latents.

    Weights for the model's patches stay unchanged. Weights at another level (see `find_level`) are
    resampled to the latent pixels and averaged over the pixels of each patch; pixels beyond the
    last whole patch belong to no token, as in the models. Every frame of a video gets the same
    weights.

    Args:
        weights: `(B, T, E)`.
        latents: `(B, C, h, w)` or `(B, C, F, h, w)`.
        model: the called model.

    Returns:
        The weights `(B, T', E)`, and the `(rows, columns)` of an image that the model may resample.

    Raises:
        ValueError: when the model rounds the sizes of its levels down, and the sides of the latents
            are not divisible.
    """
    pixels = (int(latents.shape[-2]), int(latents.shape[-1]))
    patch = _patch_size(model, latents.ndim - 2)
    if patch is None:
        if latents.ndim == 5:
            return weights, None
        _check_level_sizes(model, pixels)
        weights = _resample_to_pixels(weights, pixels)
        return weights, pixels if weights.shape[1] == pixels[0] * pixels[1] else None
    size = (pixels[0] // patch[1], pixels[1] // patch[2])
    if weights.shape[1] != size[0] * size[1]:
        weights = _pool_patches(weights, pixels, patch)
    if latents.ndim == 5:
        frames = latents.shape[2] // patch[0]
        return ImageTokens(frames * size[0] * size[1], 0, frames, size).expand_weights(
            weights
        ), None
    return weights, size if weights.shape[1] == size[0] * size[1] else None


def _resample_to_pixels(weights: Tensor, pixels: Grid) -> Tensor:
    """Resample weights to the latent pixels; weights of an unknown level stay unchanged."""
    level = find_level(pixels, (weights.shape[1],))
    if level is None:
        return weights
    if level.shrink > 1:
        return upsample(weights, level.size, level.shrink, pixels)
    return downsample(weights, level.size, level.enlarge)


def _pool_patches(weights: Tensor, pixels: Grid, patch: tuple[int, int, int]) -> Tensor:
    weights, (_, high, wide) = _resample_to_pixels(weights, pixels), patch
    if weights.shape[1] != pixels[0] * pixels[1]:
        return weights
    rows, columns = pixels[0] // high, pixels[1] // wide
    whole = weights.unflatten(1, pixels)[:, : rows * high, : columns * wide]
    averaged: Tensor = whole.unflatten(2, (columns, wide)).unflatten(1, (rows, high)).mean((2, 4))
    return averaged.flatten(1, 2)


def _patch_size(model: nn.Module, dimensions: int) -> tuple[int, int, int] | None:
    """Return the patch size `(frames, rows, columns)` of a model, if its config has one.

    UNets have no patches. For videos the size is unknown when channels do not come before frames,
    or when the config has no number of frames per patch.
    """
    if dimensions == 3 and family_of(model).video_axes != "channels_first":
        return None
    config = getattr(model, "config", None)
    size, frames = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, tuple | list) or (dimensions == 3 and len(size) + bool(frames) < 3):
        return None
    found = (1, 1, *size) if frames is None else (frames, *size)
    return int(found[-3]), int(found[-2]), int(found[-1])


def _check_level_sizes(model: nn.Module, pixels: Grid) -> None:
    """Raise when a UNet's level sizes differ from those of `find_level`."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "downsample_padding", 1) != 0:
        return
    step = 2 ** (len(config.block_out_channels) - 1)
    if pixels[0] % step or pixels[1] % step:
        raise ValueError(
            f"Expected latents with sides divisible by {step} for routing weights per token, since "
            f"{type(model).__name__} has `downsample_padding=0`, but got {pixels[0]} x {pixels[1]}."
        )
