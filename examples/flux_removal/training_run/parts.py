"""The models and the optimizer of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
)
from diffusers import FluxFillPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import moe_lora
from flux_fill.frozen_transformer import economize, load_transformer
from flux_fill.kind_hints import KindHints
from flux_fill.models import Conditioner, add_experts, router_parameters
from moe_lora import RemovalLoss
from options.kind_options import read_kind_experts
from options.train_options import TrainOptions
from removal_data.batches import LatentEncoder
from reporting.reporter import Reporter
from reporting.trackers import check_tracker
from training_run.averaging import WeightAverage, averaged
from training_run.checkpoints import Progress
from training_run.composition import compose_experts
from training_run.model_card import ModelCardWriter
from training_run.optimizers import create_optimizer
from training_run.sharding import configure_sharding

if TYPE_CHECKING:
    from training_run.validation import Validator


@dataclass
class Parts:
    """Hold what a training step uses; `model` is the prepared one."""

    accelerator: Accelerator
    pipe: FluxFillPipeline
    model: nn.Module
    encoder: LatentEncoder
    conditioner: Conditioner
    options: TrainOptions
    hints: KindHints | None = None


@dataclass
class Run:
    """Hold what the training loop uses."""

    parts: Parts
    loss: RemovalLoss
    stream: Iterator[dict[str, Tensor]]
    optimizer: Optimizer
    scheduler: LRScheduler
    progress: Progress
    reporter: Reporter
    card: ModelCardWriter
    average: WeightAverage | None = None
    validator: Validator | None = None

    def validate(self) -> None:
        """Validate, if it is due after this step, with averaged weights if there are any."""
        if self.validator is not None and self.validator.due(self.progress.step):
            with averaged(self.optimizer, self.average):
                self.validator(self.progress.step)


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_accelerator(options: TrainOptions) -> Accelerator:
    """Return accelerate's handle of devices, processes, precision and trackers.

    Raises:
        ModuleNotFoundError: when the package of the tracker is not installed.
    """
    check_tracker(options.report_to)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        # As a plugin, because DeepSpeed's environment overrides the number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=options.gradient_accumulation_steps
        ),
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(options.output_dir, logging_dir=options.logging_dir),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=True,  # the router's, in uniform phases
                gradient_as_bucket_view=True,  # no second copy of the gradients
            )
        ],
    )
    configure_sharding(accelerator, options)
    return accelerator


def build_hints(
    options: TrainOptions, kinds: Sequence[str], *, training: bool = True
) -> KindHints | None:
    """Return the task hints of samples, if the run has any.

    Args:
        options: the run's.
        kinds: of the samples.
        training: whether hints are dropped, and every kind of the options must be there.

    Raises:
        ValueError: for experts of kinds that the data do not have.
    """
    if not options.kind_experts:
        return None
    absent = sorted(set(read_kind_experts(options.kind_experts)) - set(kinds))
    if absent and training:
        raise ValueError(
            f"Expected `kind_experts` for kinds of the data, {sorted(kinds)}, but got {absent}. "
            "The key `kind` in a manifest names the kind of a sample."
        )
    dropout = options.hint_dropout if training else 0.0
    return KindHints(kinds, options.kind_experts, options.kind_hint, dropout=dropout)


def load_base(pipe: FluxFillPipeline, options: TrainOptions, device: torch.device) -> None:
    """Load the transformer in the precision, and to the place, that the options say."""
    load_transformer(
        pipe,
        options.flux_fill_id,
        dtype=DTYPES[options.mixed_precision],
        device="cpu" if options.offload else device,
        base_precision=options.base_precision,
    )


def build_model(
    pipe: FluxFillPipeline, options: TrainOptions, device: torch.device | None = None
) -> nn.Module:
    """Put experts and router into the transformer, or make all of it trainable.

    Args:
        pipe: the pipeline.
        options: the run's.
        device: of the computation; the transformer's by default.
    """
    transformer = pipe.transformer
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if not options.use_lora:
        model: nn.Module = transformer.float().requires_grad_(True)
    elif options.adapter == "lora":
        model = add_plain_lora(transformer, options)
    elif options.compose:
        model = compose_experts(transformer, options)
    else:
        model = add_experts(transformer, options, routed=options.routed)
    if options.task_hint:
        moe_lora.set_router_inputs(model, task_hint=options.task_hint)
    if options.compile:
        transformer.compile_repeated_blocks()  # compiled blocks make weights anew by themselves
    elif options.use_lora:
        dtype = DTYPES[options.mixed_precision]
        economize(transformer, dtype, device or transformer.device, offload=options.offload)
    return model.train()


def add_plain_lora(transformer: nn.Module, options: TrainOptions) -> PeftModel:
    """Inject PEFT's own LoRA, which a mixture can be compared with."""
    config = LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=options.targets,
    )
    return get_peft_model(transformer, config)


def build_optimizer(
    model: nn.Module, options: TrainOptions, step: int, total_steps: int
) -> tuple[Optimizer, LRScheduler]:
    """Return the optimizer and its schedule, which is a function of the step alone."""
    of_router = router_parameters(model)
    known = {id(parameter) for parameter in of_router}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    rate = options.learning_rate
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": rate, "initial_lr": rate, "name": "experts"}
    ]
    if of_router:
        rate = options.router_learning_rate or rate
        groups.append({"params": of_router, "lr": rate, "initial_lr": rate, "name": "router"})
    optimizer = create_optimizer(
        options.optimizer, groups, options.optimizer_arguments, options.weight_decay
    )
    scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=total_steps,
        last_epoch=step - 1,
    )
    return optimizer, scheduler
