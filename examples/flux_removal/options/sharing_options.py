"""The options of `train.py` for trackers, the model card and the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate.utils import LoggerType

from options.routing_options import option

if TYPE_CHECKING:
    from options.train_options import TrainOptions

TRACKERS = (*sorted(str(kind.value) for kind in LoggerType), "none")
"""Values of `report_to`: those of accelerate's `log_with`, and none."""

REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+")


@dataclass(kw_only=True)
class SharingOptions:
    """Say where curves and images go, and whether the adapter is uploaded."""

    report_to: str = option(
        "tensorboard",
        "Tracker of scalars and images that accelerate supports: tensorboard, wandb, trackio, "
        "comet_ml, aim, mlflow, clearml, dvclive or swanlab; all that are installed; or none.",
    )
    model_license: str | None = option(
        None, "License in the model card; that of FLUX.1 [dev] models or unknown by default."
    )
    push_to_hub: bool = option(
        False, "Upload checkpoint-best, or else the last checkpoint, at the end of the run."
    )
    hub_model_id: str | None = option(
        None, "Repository of the upload; the name of output_dir in your account by default."
    )
    hub_private: bool = option(False, "Create a private repository.")


def check_sharing(options: TrainOptions) -> None:
    """Raise for unknown trackers, and for options of the Hub that have no effect."""
    if options.report_to not in TRACKERS:
        raise ValueError(
            f"Expected `report_to` to be one of {', '.join(TRACKERS)}, but got {options.report_to}."
        )
    if not options.push_to_hub:
        for name in ("hub_model_id", "hub_private"):
            if getattr(options, name):
                raise ValueError(f"Expected --push_to_hub together with `{name}`.")
    if options.hub_model_id is not None and not REPOSITORY.fullmatch(options.hub_model_id):
        raise ValueError(
            f"Expected `hub_model_id` to be NAME or ACCOUNT/NAME, but got {options.hub_model_id!r}."
        )
