"""Extract the mask from the inputs of stock inpainting models."""

from __future__ import annotations

from torch import Tensor

_LATENT = 8
_PACK = 2
_TOKEN = _LATENT * _PACK
_MASK_CHANNELS = _TOKEN * _TOKEN
_FILL_CHANNELS = 64 + 64 + _MASK_CHANNELS
_UNET_CHANNELS = 9
_UNET_MASK_CHANNEL = 4


def from_flux_fill(hidden_states: Tensor, height: int, width: int) -> Tensor:
    """Extract the full-resolution mask from the input tokens of a FLUX Fill transformer.

    The 384 channels of a token are `64 noisy | 64 masked image | 256 mask`. The 256 mask channels
    are the 16 x 16 pixels of the token in the order `(y8, x8, y2, x2)`, where `(row, column)` =
    `(8 * y2 + y8, 8 * x2 + x8)`. The extraction is exact.

    Args:
        hidden_states: `(B, T, 384)`, or its last 256 channels, `(B, T, 256)`; tokens row by row on
            a grid of `height // 16` rows and `width // 16` columns.
        height: height of the mask in pixels, a multiple of 16.
        width: width of the mask in pixels, a multiple of 16.

    Returns:
        `(B, 1, height, width)`, in the dtype of `hidden_states`.

    Raises:
        ValueError: if `height` or `width` is not a multiple of 16, the token count is not
            `(height // 16) * (width // 16)`, or the channels are neither 384 nor 256.

    Source: the packing of `FluxFillPipeline.prepare_mask_latents` in diffusers.

    Example:
        >>> import torch
        >>> tokens = torch.zeros(1, 2, 384)
        >>> tokens[:, 1, 128:] = 1
        >>> from_flux_fill(tokens, 16, 32)[0, 0].sum(0)[[0, 15, 16, 31]].tolist()
        [0.0, 0.0, 16.0, 16.0]
    """
    for name, pixels in (("height", height), ("width", width)):
        if isinstance(pixels, bool) or not isinstance(pixels, int) or pixels < 1 or pixels % _TOKEN:
            raise ValueError(
                f"Expected `{name}` to be a positive multiple of {_TOKEN}, but got {pixels!r}."
            )
    rows, columns = height // _TOKEN, width // _TOKEN
    shape = tuple(hidden_states.shape)
    if len(shape) != 3 or shape[2] not in (_FILL_CHANNELS, _MASK_CHANNELS):
        raise ValueError(
            f"Expected `hidden_states` to have shape (B, T, {_FILL_CHANNELS}) or "
            f"(B, T, {_MASK_CHANNELS}), but got {shape}."
        )
    if shape[1] != rows * columns:
        raise ValueError(
            f"Expected `hidden_states` to have {rows} * {columns} = {rows * columns} tokens for a "
            f"mask of {height} x {width} pixels, but got {shape[1]}."
        )
    packed = hidden_states[..., -_MASK_CHANNELS:]
    pixels_ = packed.reshape(shape[0], rows, columns, _LATENT, _LATENT, _PACK, _PACK)
    return pixels_.permute(0, 1, 5, 3, 2, 6, 4).reshape(shape[0], 1, height, width)


def from_inpainting_unet(sample: Tensor) -> Tensor:
    """Extract the mask channel from the input of a nine-channel inpainting UNet.

    The channels are `4 latents | 1 mask | 4 masked-image latents`.

    Args:
        sample: `(B, 9, h, w)`, latent space.

    Returns:
        `(B, 1, h, w)`, the mask at latent size, clamped to [0, 1], in the dtype of `sample`.

    Raises:
        ValueError: if `sample` has another shape.

    Source: `StableDiffusionInpaintPipeline` in diffusers.

    Example:
        >>> import torch
        >>> sample = torch.arange(9.0).reshape(1, 9, 1, 1) / 8
        >>> from_inpainting_unet(sample).tolist()
        [[[[0.5]]]]
    """
    if sample.ndim != 4 or sample.shape[1] != _UNET_CHANNELS:
        raise ValueError(
            f"Expected `sample` to have shape (B, {_UNET_CHANNELS}, h, w), "
            f"but got {tuple(sample.shape)}."
        )
    return sample[:, _UNET_MASK_CHANNEL : _UNET_MASK_CHANNEL + 1].clamp(0, 1)
