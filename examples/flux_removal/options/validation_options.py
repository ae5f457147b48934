"""The options of `train.py` for validation during training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from options.routing_options import option

if TYPE_CHECKING:
    from options.train_options import TrainOptions

REGIONS = ("whole", "inside", "outside", "boundary", "effect")

HIGHER_IS_BETTER = {
    "loss": False,
    **{f"{name}/{region}": True for name in ("psnr", "ssim") for region in REGIONS},
    "seam_error": False,
}
"""Values of a validation, and whether a higher one is better."""


@dataclass(kw_only=True)
class ValidationOptions:
    """Say on which held-out scenes, when and how to validate."""

    validation_data_dir: str | None = option(
        None, "Held-out triplets: a folder, a manifest, or datasets:NAME."
    )
    validation_share: float = option(
        0.0, "Share of the training data that is held out instead, by hashes of the names."
    )
    validation_steps: int = option(500, "Steps between validations.")
    validation_at_start: bool = option(False, "Validate before the first step, too.")
    validation_samples: int = option(8, "Maximum number of scenes in a validation.")
    validation_denoising_steps: int = option(20, "Denoising steps of a removal.")
    validation_seed: int = option(0, "Seed of the held-out share and of the noise.")
    validation_metric: str = option(
        "psnr/inside",
        "Selects checkpoint-best: loss, seam_error, or psnr/REGION or ssim/REGION with the region "
        "whole, inside, outside, boundary or effect.",
    )

    @property
    def validated(self) -> bool:
        """Tell whether the run validates."""
        return self.validation_data_dir is not None or self.validation_share != 0


def check_validation(options: TrainOptions) -> None:
    """Raise for options of the validation that are out of range or have no effect."""
    if not options.validated:
        for name, field in ValidationOptions.__dataclass_fields__.items():
            if getattr(options, name) != field.default:
                raise ValueError(
                    f"Expected `validation_data_dir` or `validation_share` together with `{name}`."
                )
        return
    if options.validation_data_dir is not None and options.validation_share:
        raise ValueError("Expected one of `validation_data_dir` and `validation_share`, not both.")
    if not 0 <= options.validation_share < 1:
        raise ValueError(
            f"Expected `validation_share` to be in [0, 1), but got {options.validation_share}."
        )
    if options.streamed and options.validation_share:
        raise ValueError(
            "Expected `validation_data_dir` in place of `validation_share` with data in shards, "
            "whose samples are not known."
        )
    for name in ("validation_steps", "validation_samples", "validation_denoising_steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"Expected `{name}` to be >= 1, but got {getattr(options, name)}.")
    if options.validation_metric not in HIGHER_IS_BETTER:
        raise ValueError(
            f"Expected `validation_metric` to be one of {', '.join(HIGHER_IS_BETTER)}, but got "
            f"{options.validation_metric}."
        )
