"""Rectified flow: noise, velocity and clean latents, and the packing of latents into tokens.

The convention throughout: x_t = (1 - sigma) * x0 + sigma * noise, velocity = noise - x0.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "check_sigma",
    "interpolate",
    "pack_latents",
    "unpack_latents",
    "velocity",
    "velocity_to_x0",
    "x0_to_velocity",
]


def check_sigma(sigma: Tensor) -> None:
    """Raise unless every sigma is in [0, 1].

    Args:
        sigma: any shape.

    Raises:
        ValueError: for an integer tensor, NaN, or values outside [0, 1].

    Example:
        >>> check_sigma(torch.tensor([0.0, 0.5, 1.0]))
    """
    if not sigma.is_floating_point():
        raise ValueError(
            f"Expected `sigma` to be floating point in [0, 1], but got {sigma.dtype}. "
            "Timesteps in 0..1000 become sigmas by a division by 1000."
        )
    if not bool(((sigma >= 0) & (sigma <= 1)).all()):
        raise ValueError(
            f"Expected `sigma` to be in [0, 1], but got values from {sigma.min().item():g} to "
            f"{sigma.max().item():g}. Timesteps in 0..1000 become sigmas by a division by 1000."
        )


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Mix data and noise at a noise level.

    x_t = (1 - sigma) * x0 + sigma * noise

    Args:
        x0: `(B, ...)`, clean latents of any rank.
        noise: the shape of `x0`.
        sigma: `(B,)` or a scalar tensor, in [0, 1].

    Returns:
        x_t, with the shape and dtype of the latents, also for a `sigma` of higher precision.

    Raises:
        ValueError: when the shapes do not match.

    Example:
        >>> interpolate(torch.tensor([[2.0]]), torch.tensor([[10.0]]), torch.tensor([0.25]))
        tensor([[4.]])
    """
    _check_same_shape("noise", noise, x0)
    level = _per_sample(sigma, x0)
    return ((1 - level) * x0 + level * noise).to(torch.promote_types(x0.dtype, noise.dtype))


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """Compute the velocity, the prediction target of the transformer.

    velocity = noise - x0

    Args:
        x0: `(B, ...)`, clean latents.
        noise: the shape of `x0`.

    Returns:
        The velocity, of the same shape.

    Raises:
        ValueError: when the shapes differ.

    Source: Liu, Gong, Liu, "Flow straight and fast", 2022, arXiv:2209.03003, equation 1, with time
        reversed.

    Example:
        >>> velocity(torch.tensor([2.0]), torch.tensor([10.0]))
        tensor([8.])
    """
    _check_same_shape("noise", noise, x0)
    return noise - x0


def velocity_to_x0(x_t: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """Estimate the clean latents from a predicted velocity.

    x0 = x_t - sigma * velocity

    The gradient with respect to the velocity is -sigma.

    Args:
        x_t: `(B, ...)`, noisy latents of any rank.
        velocity: the shape of `x_t`.
        sigma: `(B,)` or a scalar tensor, in [0, 1].

    Returns:
        x0, the shape and dtype of the latents.

    Raises:
        ValueError: when the shapes do not match.

    Example:
        >>> velocity_to_x0(torch.tensor([[4.0]]), torch.tensor([[8.0]]), torch.tensor([0.25]))
        tensor([[2.]])
    """
    _check_same_shape("velocity", velocity, x_t)
    x0 = x_t - _per_sample(sigma, x_t) * velocity
    return x0.to(torch.promote_types(x_t.dtype, velocity.dtype))


def x0_to_velocity(x_t: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """Compute the velocity from noisy and clean latents.

    velocity = (x_t - x0) / sigma

    Args:
        x_t: `(B, ...)`, noisy latents of any rank.
        x0: the shape of `x_t`.
        sigma: `(B,)` or a scalar tensor, in (0, 1].

    Returns:
        The velocity, of the shape and dtype of the latents.

    Raises:
        ValueError: when the shapes do not match, or for a sigma of 0, where the velocity is
            undetermined.

    Example:
        >>> x0_to_velocity(torch.tensor([[4.0]]), torch.tensor([[2.0]]), torch.tensor([0.25]))
        tensor([[8.]])
    """
    _check_same_shape("x0", x0, x_t)
    if not bool((sigma > 0).all()):
        raise ValueError(
            "Expected `sigma` to be > 0, since x_t does not determine a velocity at 0, "
            f"but got a minimum of {sigma.min().item():g}."
        )
    flow = (x_t - x0) / _per_sample(sigma, x_t)
    return flow.to(torch.promote_types(x_t.dtype, x0.dtype))


def pack_latents(latents: Tensor) -> Tensor:
    """Fold every 2x2 patch of the latents into one token.

    token[i * w/2 + j, 4c + 2p + q] = latents[c, 2i + p, 2j + q]

    Args:
        latents: `(B, C, h, w)`, h and w even.

    Returns:
        `(B, (h/2)*(w/2), 4C)`, tokens in row-major order.

    Raises:
        ValueError: for another rank, or an odd height or width.

    Example:
        >>> pack_latents(torch.arange(8.0).view(1, 1, 2, 4))
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    if latents.ndim != 4 or latents.shape[2] % 2 or latents.shape[3] % 2:
        raise ValueError(
            "Expected `latents` to have shape (B, C, h, w) with h and w even, "
            f"but got {tuple(latents.shape)}."
        )
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    tokens = patches.permute(0, 2, 4, 1, 3, 5)
    return tokens.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack_latents(packed_latents: Tensor, height: int, width: int) -> Tensor:
    """Unfold tokens into latents; the inverse of `pack_latents`.

    Args:
        packed_latents: `(B, (height/2)*(width/2), 4C)`.
        height: of the latents (not of the image), even.
        width: of the latents (not of the image), even.

    Returns:
        `(B, C, height, width)`.

    Raises:
        ValueError: for another rank, odd sizes, a number of channels not divisible by 4, or another
            number of tokens than (height/2)*(width/2).

    Example:
        >>> tokens = torch.tensor([[[0.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 7.0]]])
        >>> unpack_latents(tokens, height=2, width=4)
        tensor([[[[0., 1., 2., 3.],
                  [4., 5., 6., 7.]]]])
    """
    if packed_latents.ndim != 3 or packed_latents.shape[2] % 4:
        raise ValueError(
            "Expected `packed_latents` to have shape (B, tokens, 4C), "
            f"but got {tuple(packed_latents.shape)}."
        )
    if height < 2 or width < 2 or height % 2 or width % 2:
        raise ValueError(
            "Expected latent `height` and `width` to be even and positive, "
            f"but got {height} and {width}."
        )
    batch, tokens, channels = packed_latents.shape
    rows, columns = height // 2, width // 2
    if tokens != rows * columns:
        raise ValueError(
            f"Expected `packed_latents` to have (height/2)*(width/2) = {rows * columns} tokens for "
            f"latents of {height}x{width}, but got {tokens}. `height` and `width` are those of the "
            "latents, not of the image."
        )
    patches = packed_latents.reshape(batch, rows, columns, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, height, width)


def _per_sample(sigma: Tensor, latents: Tensor) -> Tensor:
    """Reshape sigma so that it broadcasts over all dimensions but the batch."""
    if sigma.ndim == 0:
        return sigma
    if sigma.shape != latents.shape[:1]:
        raise ValueError(
            f"Expected `sigma` to have shape (B,) = ({latents.shape[0]},), "
            f"but got {tuple(sigma.shape)}."
        )
    return sigma.view(-1, *[1] * (latents.ndim - 1))


def _check_same_shape(name: str, tensor: Tensor, latents: Tensor) -> None:
    if tensor.shape != latents.shape:
        raise ValueError(
            f"Expected `{name}` to have shape {tuple(latents.shape)}, "
            f"but got {tuple(tensor.shape)}."
        )
