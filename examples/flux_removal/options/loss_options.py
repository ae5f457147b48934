"""The options of `train.py` for losses and noise levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from options.routing_options import CourseOptions, option

if TYPE_CHECKING:
    from options.train_options import TrainOptions


@dataclass(kw_only=True)
class LossOptions(CourseOptions):
    """Switch losses on and weigh them."""

    enable_base_loss: bool = option(True, "Enable the base loss: velocities in latent space.")
    base_loss_weight: float = option(1.0, "Weight of the base loss.")
    enable_boundary_loss: bool = option(
        False, "Enable the boundary loss: image gradients along the edge of the mask."
    )
    boundary_loss_weight: float = option(0.3, "Weight of the boundary loss.")
    enable_consistency_loss: bool = option(
        False, "Enable the consistency loss: pixels outside the mask, compared with the target."
    )
    consistency_loss_weight: float = option(0.5, "Weight of the consistency loss.")
    enable_detail_loss: bool = option(
        False, "Enable the detail loss: high frequencies inside the mask."
    )
    detail_loss_weight: float = option(0.2, "Weight of the detail loss.")
    enable_mask_info: bool = option(
        False, "Analyze the masks, as routing requires, and log their properties."
    )
    expert_signals: bool = option(
        False, "Assign one loss to each sample; a specialized loss trains its own expert only."
    )
    effect_band: int = option(
        0, "Width in pixels of a band around the mask with a reduced consistency loss."
    )
    specialized_every: int = option(
        1, "Compute the specialized losses every n-th step, with n times their weight."
    )
    window_margin: int | None = option(
        None, "Decode with gradient in the box of the mask and this margin in latents only."
    )
    max_sigma: float = option(
        0.7, "Noise level above which samples are excluded from the pixel losses."
    )
    weighting_scheme: Literal["logit_normal", "mode", "none", "sigma_sqrt", "cosmap"] = option(
        "logit_normal",
        "Distribution (the first two) or weighting of noise levels, as in diffusers.",
    )
    logit_mean: float = option(0.0, "Mean of logit_normal.")
    logit_std: float = option(1.0, "Standard deviation of logit_normal.")
    mode_scale: float = option(1.29, "Scale of mode.")
    vae_checkpointing: bool = option(
        False, "Decode sample by sample, and recompute in the backward pass."
    )


LOSS_DEFAULTS = {
    name: LossOptions.__dataclass_fields__[f"{name}_loss_weight"].default
    for name in ("base", "boundary", "consistency", "detail")
}


def check_losses(options: TrainOptions) -> None:
    """Raise for losses that are off, lack what they need, or have weights without effect."""
    for name in ("base", "boundary", "consistency", "detail"):
        weight, usual = getattr(options, f"{name}_loss_weight"), LOSS_DEFAULTS[name]
        if not getattr(options, f"enable_{name}_loss") and weight != usual:
            raise ValueError(
                f"Expected --enable_{name}_loss together with --{name}_loss_weight {weight}, "
                "which has no effect without it."
            )
    if not (options.enable_base_loss or options.specialized):
        raise ValueError("Expected at least one loss to be enabled, but all are off.")
    if options.specialized and not options.enable_mask_info:
        raise ValueError(
            "Expected --enable_mask_info together with a boundary, consistency or detail loss: "
            "these switch routing on, and routing needs the masks analyzed."
        )
    if options.expert_signals and not (
        options.specialized
        and options.enable_base_loss
        and options.mixed
        and options.num_experts == 3
    ):
        raise ValueError(
            "Expected a mixture of three experts, the base loss and a specialized loss with "
            "`expert_signals`."
        )


def check_pixel_losses(options: TrainOptions) -> None:
    """Raise for options of pixel losses that are out of range or have no effect."""
    ways = {"window_margin": None, "specialized_every": 1}
    for name, off in ways.items():
        if getattr(options, name) != off and not options.specialized:
            raise ValueError(
                f"Expected a boundary, consistency or detail loss with `{name}`, which has no "
                "effect without one."
            )
    if options.effect_band and not options.enable_consistency_loss:
        raise ValueError("Expected --enable_consistency_loss together with `effect_band`.")
    if options.specialized_every != 1 and options.expert_signals:
        raise ValueError("Expected `specialized_every` 1 with `expert_signals`.")
