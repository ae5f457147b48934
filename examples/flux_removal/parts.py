"""Build what a training run is made of."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from diffusers import FluxFillPipeline
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

import moe_lora
from batches import BucketBatches, LatentEncoder, picture_sizes
from dataset import RemovalDataset
from models import Conditioner, add_experts, router_parameters
from moe_lora import RemovalLoss
from moe_lora.losses import LatentDecoder
from options import TrainOptions


@dataclass
class Parts:
    """Hold what a training step uses; `model` is the prepared one."""

    accelerator: Accelerator
    pipe: FluxFillPipeline
    model: nn.Module
    encoder: LatentEncoder
    conditioner: Conditioner
    options: TrainOptions


def build_losses(options: TrainOptions, vae: nn.Module) -> tuple[RemovalLoss, RemovalLoss]:
    """Return the losses of the uniform phase and of the rest of the run."""
    weighting = options.weighting_scheme
    weighed = weighting if weighting in ("sigma_sqrt", "cosmap") else "none"
    enabled = {
        name: getattr(options, f"{name}_loss_weight")
        for name in ("base", "boundary", "consistency", "detail")
        if getattr(options, f"enable_{name}_loss")
    }
    everything = RemovalLoss(
        base=enabled.get("base"),
        boundary=enabled.get("boundary"),
        consistency=enabled.get("consistency"),
        detail=enabled.get("detail"),
        decoder=LatentDecoder(vae, checkpoint=options.vae_checkpointing),
        weighting=weighed,
        max_sigma=options.max_sigma,
    )
    if not options.uniform_steps:
        return everything, everything
    foundation = RemovalLoss(enabled["base"], None, None, None, weighting=weighed)
    return foundation, everything


def build_model(pipe: FluxFillPipeline, options: TrainOptions) -> nn.Module:
    """Put experts and router into the transformer, or make all of it trainable."""
    transformer = pipe.transformer
    if options.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if not options.use_lora:
        return transformer.float().requires_grad_(True).train()
    model = add_experts(transformer, options, routed=options.routed).train()
    if options.task_hint:
        moe_lora.set_router_inputs(model, task_hint=options.task_hint)
    return model


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


def build_batches(
    dataset: RemovalDataset, options: TrainOptions, accelerator: Accelerator
) -> BucketBatches:
    """Return the batches of this process, from the start."""
    return BucketBatches(
        picture_sizes(dataset),
        options.batch_size,
        seed=options.seed,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )


def order_of_data(options: TrainOptions, accelerator: Accelerator, samples: int) -> dict[str, int]:
    """Return what decides the order of the data; a run can go on only where it stays the same."""
    return {
        "seed": options.seed,
        "batch_size": options.batch_size,
        "processes": accelerator.num_processes,
        "samples": samples,
    }
