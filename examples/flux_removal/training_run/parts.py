"""The models and the optimizer of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from diffusers import FluxFillPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

import moe_lora
from flux_fill.models import Conditioner, add_experts, router_parameters
from moe_lora import RemovalLoss
from options.train_options import TrainOptions
from removal_data.batches import LatentEncoder
from reporting.reporter import Reporter
from reporting.trackers import check_tracker
from training_run.checkpoints import Progress
from training_run.model_card import ModelCardWriter

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
    validator: Validator | None = None

    def validate(self) -> None:
        """Validate, if it is due after this step."""
        if self.validator is not None and self.validator.due(self.progress.step):
            self.validator(self.progress.step)


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_accelerator(options: TrainOptions) -> Accelerator:
    """Return accelerate's handle of devices, processes, precision and trackers.

    Raises:
        ModuleNotFoundError: when the package of the tracker is not installed.
    """
    check_tracker(options.report_to)
    return Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(options.output_dir, logging_dir=options.logging_dir),
        # Uniform phases leave the router's parameters unused.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def build_model(pipe: FluxFillPipeline, options: TrainOptions) -> nn.Module:
    """Put experts and router into the transformer, or make all of it trainable."""
    transformer = pipe.transformer
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if not options.use_lora:
        return transformer.float().requires_grad_(True).train()
    if options.adapter == "lora":
        return add_plain_lora(transformer, options).train()
    model = add_experts(transformer, options, routed=options.routed).train()
    if options.task_hint:
        moe_lora.set_router_inputs(model, task_hint=options.task_hint)
    return model


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
) -> tuple[AdamW, LRScheduler]:
    """Return AdamW and its schedule, which is a function of the step alone."""
    of_router = router_parameters(model)
    known = {id(parameter) for parameter in of_router}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    rate = options.learning_rate
    groups = [{"params": rest, "lr": rate, "initial_lr": rate}]
    if of_router:
        rate = options.router_learning_rate or rate
        groups.append({"params": of_router, "lr": rate, "initial_lr": rate})
    optimizer = AdamW(groups, weight_decay=options.weight_decay)
    scheduler = get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=total_steps,
        last_epoch=step - 1,
    )
    return optimizer, scheduler
