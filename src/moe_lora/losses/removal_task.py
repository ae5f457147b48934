"""The removal loss as one function with a flag for each component."""

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
    specialised_every: int = 1,
    step: int | None = None,
) -> RemovalLossOutput:
    """Compute the removal losses that the flags switch on, as `RemovalLoss` does.

    Args:
        velocity: see `RemovalLoss.forward`, as for the other tensors and the latent sizes.
        target_velocity: likewise.
        x_t: likewise.
        sigma: likewise.
        mask: likewise.
        target: likewise.
        decoder: see `RemovalLoss`.
        height: of the latents; required with packed ones.
        width: of the latents, likewise.
        enable_base_loss: latent MSE on or off.
        enable_boundary_loss: gradient match in a band around the mask's edge on or off.
        enable_consistency_loss: match outside the mask on or off.
        enable_detail_loss: match of high frequencies inside the mask on or off.
        base_loss_weight: >= 0; counts only where the flag is on, as do the next three.
        boundary_loss_weight: likewise.
        consistency_loss_weight: likewise.
        detail_loss_weight: likewise.
        weighting: see `RemovalLoss`, as for the next one.
        max_sigma: likewise.
        boundary_width: likewise, as for the next three.
        effect_band: likewise.
        window_margin: likewise.
        specialised_every: likewise.
        step: see `RemovalLoss.forward`.

    Returns:
        The total and the components before weighting, scalars.

    Raises:
        ValueError: as `RemovalLoss` and its `forward` do.

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
        specialised_every=specialised_every,
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
