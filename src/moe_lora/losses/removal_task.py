"""Removal loss as one function with a flag for each component."""

from __future__ import annotations

from torch import Tensor

from moe_lora.losses.flow_matching import Weighting
from moe_lora.losses.removal import DEFAULT_MAX_SIGMA, Decoder, RemovalLoss, RemovalLossOutput


def compute_removal_task_loss(
    velocity: Tensor,
    target_velocity: Tensor,
    *,
    x_t: Tensor | None = None,
    sigma: Tensor | None = None,
    mask: Tensor | None = None,
    target: Tensor | None = None,
    decoder: Decoder | None = None,
    height: int | None = None,
    width: int | None = None,
    enable_base_loss: bool = True,
    enable_boundary_loss: bool = False,
    enable_consistency_loss: bool = False,
    enable_detail_loss: bool = False,
    base_loss_weight: float = 1.0,
    boundary_loss_weight: float = 0.3,
    consistency_loss_weight: float = 0.5,
    detail_loss_weight: float = 0.2,
    weighting: Weighting = "none",
    max_sigma: float = DEFAULT_MAX_SIGMA,
    boundary_width: int | None = None,
    effect_band: int = 0,
    window_margin: int | None = None,
    specialized_every: int = 1,
    step: int | None = None,
) -> RemovalLossOutput:
    """Compute the enabled losses and their weighted sum, without a `RemovalLoss` object.

    Args:
        velocity: `(B, C, h, w)` or packed `(B, (h/2)*(w/2), 4C)`, predicted velocity.
        target_velocity: same shape as `velocity`; noise - x0.
        x_t: same shape as `velocity`, noisy latents.
        sigma: `(B,)`, noise levels in [0, 1].
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        target: `(B, 3, H, W)`, image in [0, 1].
        decoder: function from latents to images in [0, 1]; required by the specialized losses.
        height: height h of the latents; required for packed latents.
        width: width w of the latents; required for packed latents.
        enable_base_loss: whether to compute `base_loss`.
        enable_boundary_loss: whether to compute `boundary_loss`.
        enable_consistency_loss: whether to compute `consistency_loss`.
        enable_detail_loss: whether to compute `detail_loss`.
        base_loss_weight: weight of the base loss, >= 0.
        boundary_loss_weight: weight of the boundary loss, >= 0.
        consistency_loss_weight: weight of the consistency loss, >= 0.
        detail_loss_weight: weight of the detail loss, >= 0.
        weighting: see `RemovalLoss`.
        max_sigma: see `RemovalLoss`.
        boundary_width: see `RemovalLoss`.
        effect_band: see `RemovalLoss`.
        window_margin: see `RemovalLoss`.
        specialized_every: see `RemovalLoss`.
        step: see `RemovalLoss.forward`.

    Returns:
        The total and the components before weighting, scalars.

    Raises:
        ValueError: if an argument is invalid for `RemovalLoss` or `RemovalLoss.forward`.

    Example:
        >>> import torch
        >>> total, components = compute_removal_task_loss(torch.ones(1, 4), torch.zeros(1, 4))
        >>> total, components
        (tensor(1.), {'base': tensor(1.)})
    """
    loss = RemovalLoss(
        base=base_loss_weight if enable_base_loss else None,
        boundary=boundary_loss_weight if enable_boundary_loss else None,
        consistency=consistency_loss_weight if enable_consistency_loss else None,
        detail=detail_loss_weight if enable_detail_loss else None,
        decoder=decoder,
        weighting=weighting,
        max_sigma=max_sigma,
        boundary_width=boundary_width,
        effect_band=effect_band,
        window_margin=window_margin,
        specialized_every=specialized_every,
    )
    output: RemovalLossOutput = loss(
        velocity,
        target_velocity,
        x_t=x_t,
        sigma=sigma,
        mask=mask,
        target=target,
        height=height,
        width=width,
        step=step,
    )
    return output
