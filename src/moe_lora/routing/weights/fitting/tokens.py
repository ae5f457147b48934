"""Step 2: routing weights per token, for the tokens that a model makes of its latents."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moe_lora.families import family_of
from moe_lora.routing.model_call.call import ModelCall
from moe_lora.routing.model_call.image_tokens import Grid, ImageTokens
from moe_lora.routing.weights.fitting.resampling import coarsen, enlarge, level_of


def fit_to_tokens(weights: Tensor, call: ModelCall) -> tuple[Tensor, Grid | None]:
    """Fit token weights to the tokens that the model makes of its latents.

    Args:
        weights: `(B, T, E)`.
        call: the model's call.

    Returns:
        The weights `(B, T', E)`, and the `(rows, columns)` of an image that the model may
        resample.

    Raises:
        ValueError: when the call says which of its tokens are the image, and there are weights for
            another number; or as `place_on_latents` does.
    """
    latents = call.latents
    if latents.ndim == 3 and weights.shape[1] != latents.shape[1]:
        tokens = call.image_tokens
        return weights if tokens is None else tokens.spread(weights), None
    if latents.ndim in (4, 5):
        return place_on_latents(weights, latents, call.model)
    return weights, None


def place_on_latents(
    weights: Tensor, latents: Tensor, model: nn.Module
) -> tuple[Tensor, Grid | None]:
    """Fit token weights to unpacked latents.

    Weights for the model's patches are used as they are. Weights at any other resolution that
    `level_of` finds are brought to the latent pixels, and averaged over the
    pixels of each patch; pixels beyond the last whole patch belong to no token, as in the models.
    Every frame of a video takes the weights of one image.

    Args:
        weights: `(B, T, E)`.
        latents: `(B, C, h, w)` or `(B, C, F, h, w)`.
        model: the model that is called.

    Returns:
        The weights `(B, T', E)`, and the `(rows, columns)` of an image that the model may resample.

    Raises:
        ValueError: the model rounds the sizes of its levels down, and the latents' do not divide.
    """
    pixels = (int(latents.shape[-2]), int(latents.shape[-1]))
    patch = _patch_size(model, latents.ndim - 2)
    if patch is None:
        if latents.ndim == 5:
            return weights, None
        _check_levels(model, pixels)
        weights = _by_pixel(weights, pixels)
        return weights, pixels if weights.shape[1] == pixels[0] * pixels[1] else None
    size = (pixels[0] // patch[1], pixels[1] // patch[2])
    if weights.shape[1] != size[0] * size[1]:
        weights = _by_patch(weights, pixels, patch)
    if latents.ndim == 5:
        frames = latents.shape[2] // patch[0]
        return ImageTokens(frames * size[0] * size[1], 0, frames, size).spread(weights), None
    return weights, size if weights.shape[1] == size[0] * size[1] else None


def _by_pixel(weights: Tensor, pixels: Grid) -> Tensor:
    """Bring weights to the latent pixels; those of no known resolution stay as they are."""
    level = level_of(pixels, (weights.shape[1],))
    if level is None:
        return weights
    if level.shrink > 1:
        return enlarge(weights, level.size, level.shrink, pixels)
    return coarsen(weights, level.size, level.enlarge)


def _by_patch(weights: Tensor, pixels: Grid, patch: tuple[int, int, int]) -> Tensor:
    weights, (_, high, wide) = _by_pixel(weights, pixels), patch
    if weights.shape[1] != pixels[0] * pixels[1]:
        return weights
    rows, columns = pixels[0] // high, pixels[1] // wide
    whole = weights.unflatten(1, pixels)[:, : rows * high, : columns * wide]
    averaged: Tensor = whole.unflatten(2, (columns, wide)).unflatten(1, (rows, high)).mean((2, 4))
    return averaged.flatten(1, 2)


def _patch_size(model: nn.Module, dimensions: int) -> tuple[int, int, int] | None:
    """Return `(frames, rows, columns)` of the patches that a model cuts latents into, if it tells.

    UNets cut none. Videos are left alone where channels do not come before frames, or where it is
    not told how many frames a patch has.
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


def _check_levels(model: nn.Module, pixels: Grid) -> None:
    """Raise where a UNet's levels are not those that `level_of` describes."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "downsample_padding", 1) != 0:
        return
    step = 2 ** (len(config.block_out_channels) - 1)
    if pixels[0] % step or pixels[1] % step:
        raise ValueError(
            f"Expected latents whose sides divide by {step} for routing weights per token, since "
            f"{type(model).__name__} has `downsample_padding=0`, but got {pixels[0]} x {pixels[1]}."
        )
