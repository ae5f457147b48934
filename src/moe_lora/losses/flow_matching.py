"""Base loss: flow matching in latent space."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moe_lora.flow import check_sigma
from moe_lora.losses.reduction import Reduction, at_least_float32, reduce_batch

Weighting = Literal["none", "sigma_sqrt", "cosmap"]


def check_weighting(weighting: str) -> None:
    """Check that a weighting scheme is known.

    Args:
        weighting: name of the scheme.

    Raises:
        ValueError: if the name is not in `Weighting`.

    Example:
        >>> check_weighting("cosmap")
    """
    if weighting not in get_args(Weighting):
        raise ValueError(
            f"Expected `weighting` to be one of {list(get_args(Weighting))}, but got {weighting!r}."
        )


def sigma_weight(sigma: Tensor, weighting: Weighting = "none") -> Tensor:
    """Compute loss weights by noise level.

    none: 1
    sigma_sqrt: sigma^-2
    cosmap: 2 / (pi * (1 - 2 * sigma + 2 * sigma^2))

    Args:
        sigma: `(B,)`, noise levels in [0, 1]; in (0, 1] for "sigma_sqrt".
        weighting: "none", "sigma_sqrt" or "cosmap".

    Returns:
        `(B,)`, > 0, in float32 or wider.

    Raises:
        ValueError: if the scheme is unknown, a sigma is outside [0, 1], or a sigma is 0 with
            "sigma_sqrt", where the weight is infinite.

    Source: Esser et al., "Scaling rectified flow transformers for high-resolution image synthesis",
        2024, arXiv:2403.03206, section 3.1 (CosMap as a density over uniformly drawn timesteps);
        names as in the SD3 training scripts of diffusers.

    Example:
        >>> sigma_weight(torch.tensor([0.5, 1.0]), "cosmap")
        tensor([1.2732, 0.6366])
    """
    check_weighting(weighting)
    check_sigma(sigma)
    sigma = at_least_float32(sigma)
    if weighting == "sigma_sqrt":
        if bool((sigma == 0).any()):
            raise ValueError(
                'Expected `sigma` to be > 0 with `weighting="sigma_sqrt"`, but got a sigma of 0.'
            )
        return sigma**-2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


def base_loss(
    velocity: Tensor,
    target_velocity: Tensor,
    *,
    sigma: Tensor | None = None,
    weighting: Weighting = "none",
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the flow-matching loss, a weighted mean squared error of velocities.

    mean over b of weight(sigma_b) * mean((velocity_b - target_velocity_b)²)

    Args:
        velocity: `(B, ...)`, predicted velocity, packed or unpacked.
        target_velocity: same shape as `velocity`; noise - x0.
        sigma: `(B,)`, noise levels in [0, 1]; required unless `weighting` is "none".
        weighting: "none", "sigma_sqrt" or "cosmap"; see `sigma_weight`.
        reduction: "mean" or "none".

    Returns:
        A scalar for "mean", `(B,)` for "none"; float32 or wider.

    Raises:
        ValueError: if shapes do not match, the scheme or reduction is unknown, or a required
            `sigma` is missing.

    Example:
        >>> base_loss(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2))
        tensor(5.)
        >>> base_loss(
        ...     torch.tensor([[3.0, 1.0]]),
        ...     torch.zeros(1, 2),
        ...     sigma=torch.tensor([0.5]),
        ...     weighting="sigma_sqrt",
        ... )
        tensor(20.)
    """
    check_weighting(weighting)
    if velocity.shape != target_velocity.shape:
        raise ValueError(
            f"Expected `target_velocity` to have the shape of `velocity`, {tuple(velocity.shape)}, "
            f"but got {tuple(target_velocity.shape)}."
        )
    difference = at_least_float32(velocity) - at_least_float32(target_velocity)
    per_sample = difference.square().flatten(1).mean(dim=1)
    if weighting != "none":
        if sigma is None:
            raise ValueError(
                f"Expected `sigma` to be a tensor for `weighting={weighting!r}`, but got None."
            )
        if sigma.shape != per_sample.shape:
            raise ValueError(
                f"Expected `sigma` to have shape (B,) = {tuple(per_sample.shape)}, "
                f"but got {tuple(sigma.shape)}."
            )
        per_sample = sigma_weight(sigma, weighting) * per_sample
    return reduce_batch(per_sample, reduction)


class BaseLoss(nn.Module):
    """Module form of `base_loss`.

    Args:
        weighting: "none", "sigma_sqrt" or "cosmap".
        reduction: "mean" or "none".

    Example:
        >>> BaseLoss()(torch.tensor([[3.0, 1.0]]), torch.zeros(1, 2))
        tensor(5.)
    """

    def __init__(self, *, weighting: Weighting = "none", reduction: Reduction = "mean") -> None:
        super().__init__()
        self.weighting = weighting
        self.reduction = reduction

    def forward(
        self, velocity: Tensor, target_velocity: Tensor, sigma: Tensor | None = None
    ) -> Tensor:
        """Compute `base_loss` with these settings."""
        return base_loss(
            velocity,
            target_velocity,
            sigma=sigma,
            weighting=self.weighting,
            reduction=self.reduction,
        )
