"""The plan of a run: parameters, memory by part and disk, before any weight is loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from flux_fill.models import check_source, mixture_config
from moe_lora.planning import Fit, TrainingPlan, example_call, model_on_meta, plan_training
from options.train_options import TrainOptions

PRECISION = {"no": "fp32", "fp16": "bf16", "bf16": "bf16"}  # fp16 needs what bf16 needs

OPTIMIZERS = {
    "AdamW": "adamw",
    "Adam": "adamw",
    "NAdam": "adamw",
    "RAdam": "adamw",
    "SGD": "sgd",
    "bnb.AdamW8bit": "adamw_8bit",
    "bnb.Adam8bit": "adamw_8bit",
    "Prodigy": "prodigy",
    "AdamWScheduleFree": "schedule_free",
    "RAdamScheduleFree": "schedule_free",
}
"""The memory of optimizers, as a name of `moe_lora.planning.OPTIMIZERS`; others count as AdamW."""


def plan_run(options: TrainOptions, height: int, width: int, *, steps: bool = True) -> TrainingPlan:
    """Plan a run with experts.

    Args:
        options: the run's.
        height: of the images, in pixels.
        width: of the images, in pixels.
        steps: follow a training step for its activations, which takes about a minute for FLUX.1.
            Cards too small for the run are planned with gradient checkpointing as well.
    """
    check_source(options.flux_fill_id)
    computation = PRECISION[options.mixed_precision]
    dtype = torch.float32 if computation == "fp32" else torch.bfloat16
    model = model_on_meta(options.flux_fill_id, dtype)
    call = example_call(model, height, width, options.batch_size) if steps else None
    plan = partial(
        plan_training,
        model,
        mixture_config(options, routed=options.routed),
        call,
        base_precision=options.base_precision or computation,
        optimizer=OPTIMIZERS.get(options.optimizer, "adamw"),
        offload=options.offload,
    )
    found = plan(checkpointing=options.gradient_checkpointing)
    enough = all(fit and fit.r == options.lora_r for fit in found.fits.values())
    if call is None or options.gradient_checkpointing or enough:
        return found
    less = plan(checkpointing=True).fits
    return replace(found, fits={card: better(fit, less[card]) for card, fit in found.fits.items()})


def better(fit: Fit | None, other: Fit | None) -> Fit | None:
    """Return the setting with the higher rank; the first of equals."""
    known = [each for each in (fit, other) if each is not None]
    return max(known, key=lambda each: each.r) if known else None


def flags_of(fit: Fit) -> str:
    """Return the flags of `train.py` for a setting that fits a card."""
    optimizer = next(name for name, planned in OPTIMIZERS.items() if planned == fit.optimizer)
    flags = [f"--base_precision {fit.base_precision} --lora_r {fit.r} --optimizer {optimizer}"]
    flags += ["--offload"] * fit.offload
    flags += ["--gradient_checkpointing"] * fit.checkpointing
    return " ".join(flags)


def describe(plan: TrainingPlan) -> str:
    """Return the plan as lines, with the size of a checkpoint, and the flags that fit a card.

    A checkpoint has the adapter, every expert as a plain LoRA, and the optimizer's state.
    """
    size = plan.checkpoint + plan.adapter_file
    lines = [str(replace(plan, fits={})), f"{'with experts/ each':<20}{size / 2**30:>10.3f} GiB"]
    for card, fit in plan.fits.items():
        setting = f"{flags_of(fit)}: {fit.memory / 2**30:.3f} GiB" if fit else "nothing"
        lines.append(f"{f'fits {card} GiB':<20}  {setting}")
    return "\n".join(lines)
