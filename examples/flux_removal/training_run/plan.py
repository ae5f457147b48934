"""The plan of a run: parameters, memory by part and disk, before any weight is loaded."""

from __future__ import annotations

import torch

from flux_fill.models import check_source, mixture_config
from moe_lora.planning import TrainingPlan, example_call, model_on_meta, plan_training
from options.train_options import TrainOptions

PRECISION = {"no": "fp32", "fp16": "bf16", "bf16": "bf16"}  # fp16 needs what bf16 needs


def plan_run(options: TrainOptions, height: int, width: int, *, steps: bool = True) -> TrainingPlan:
    """Plan a run with experts.

    Args:
        options: the run's.
        height: of the images, in pixels.
        width: of the images, in pixels.
        steps: follow a training step for its activations, which takes about a minute for FLUX.1.
    """
    check_source(options.flux_fill_id)
    precision = PRECISION[options.mixed_precision]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = model_on_meta(options.flux_fill_id, dtype)
    call = example_call(model, height, width, options.batch_size) if steps else None
    return plan_training(
        model,
        mixture_config(options, routed=options.routed),
        call,
        base_precision=precision,
        checkpointing=options.gradient_checkpointing,
    )


def describe(plan: TrainingPlan) -> str:
    """Return the plan as lines, with the size of one of the run's checkpoints.

    A checkpoint has the adapter, every expert as a plain LoRA, and the optimizer's state.
    """
    size = plan.checkpoint + plan.adapter_file
    return f"{plan}\n{'with experts/ each':<20}{size / 2**30:>10.3f} GiB"
