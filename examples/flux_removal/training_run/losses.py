"""The losses of a run, and the noise levels of its samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn

import moe_lora
from moe_lora import RemovalLoss
from moe_lora.losses import ExpertSignals, LatentDecoder, RemovalLossOutput
from moe_lora.routing import entropy_floor_loss
from moe_lora.tuner import orthogonality_loss
from options.train_options import TrainOptions

SMALLEST_SIGMA = 1e-3


def enabled_losses(options: TrainOptions) -> dict[str, float]:
    """Return the weights of the losses that are enabled, by component."""
    names = ("base", "boundary", "consistency", "detail")
    return {
        name: getattr(options, f"{name}_loss_weight")
        for name in names
        if getattr(options, f"enable_{name}_loss")
    }


def build_loss(options: TrainOptions, vae: nn.Module) -> RemovalLoss:
    """Return the loss with all that is enabled."""
    weighting = options.weighting_scheme
    enabled = enabled_losses(options)
    return RemovalLoss(
        base=enabled.get("base"),
        boundary=enabled.get("boundary"),
        consistency=enabled.get("consistency"),
        detail=enabled.get("detail"),
        decoder=LatentDecoder(vae, checkpoint=options.vae_checkpointing),
        weighting=weighting if weighting in ("sigma_sqrt", "cosmap") else "none",
        max_sigma=options.max_sigma,
        effect_band=options.effect_band,
        window_margin=options.window_margin,
        specialized_every=options.specialized_every,
    )


def assign_signals(
    model: nn.Module, loss: RemovalLoss, sigma: Tensor, options: TrainOptions
) -> tuple[Callable[..., RemovalLossOutput], AbstractContextManager[None]]:
    """Return the loss, and the context that the model is called in.

    With `expert_signals` every sample gets one component, which trains its own expert.
    """
    if not (options.expert_signals and loss.specialized):
        return loss, nullcontext()
    signals = ExpertSignals(loss)
    assignment = signals.assign(sigma)
    teaching = moe_lora.routing.teach_experts(model, signals.expert_grad_mask(assignment))
    return partial(signals, assignment=assignment), teaching


def auxiliary_loss(
    model: nn.Module, options: TrainOptions, labels: Tensor | None = None
) -> Tensor | float:
    """Return what teaches and balances the router and keeps experts apart, after a forward pass.

    Args:
        model: the transformer.
        options: of the run.
        labels: `(B,)`, the expert of each sample, -1 for unknown.
    """
    total: Tensor | float = 0.0
    decision = moe_lora.current_routing(model) if options.mixed else None
    if decision is not None and options.load_balancing_weight:
        balance = moe_lora.routing.load_balancing_loss(decision.weights)
        total = total + options.load_balancing_weight * balance
    if decision is not None and options.router_z_weight:
        total = total + options.router_z_weight * moe_lora.routing.router_z_loss(decision.logits)
    if decision is not None and options.entropy_floor_weight:
        decided = entropy_floor_loss(decision.weights, options.entropy_floor)
        total = total + options.entropy_floor_weight * decided
    if decision is not None and labels is not None and options.router_supervision_weight:
        taught = moe_lora.routing.router_supervision_loss(decision.logits, labels)
        total = total + options.router_supervision_weight * taught
    if options.orthogonality_weight:
        total = total + options.orthogonality_weight * orthogonality_loss(model)
    return total


def draw_sigma(batch: int, options: TrainOptions) -> Tensor:
    """Draw noise levels `(batch,)` in (0, 1]."""
    sigma: Tensor = compute_density_for_timestep_sampling(
        options.weighting_scheme,
        batch,
        logit_mean=options.logit_mean,
        logit_std=options.logit_std,
        mode_scale=options.mode_scale,
    )
    return sigma.clamp(SMALLEST_SIGMA, 1.0)
