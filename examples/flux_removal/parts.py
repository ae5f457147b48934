"""Build what a training run is made of."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from diffusers import FluxFillPipeline
from diffusers.optimization import get_scheduler
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

import moe_lora
from batches import BucketBatches, LatentEncoder, picture_sizes
from dataset import RemovalDataset
from models import Conditioner, add_experts, router_parameters
from moe_lora import RemovalLoss, entropy_floor_loss, orthogonality_loss
from moe_lora.losses import LatentDecoder
from moe_lora.schedules import Annealing, Phase, Schedule
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


def build_schedule(options: TrainOptions) -> Schedule:
    """Return what changes in the course of the run: phases, warm-up and temperature."""
    enabled, mode = enabled_losses(options), "routed" if options.routed else "uniform"
    warmup = options.specialized_warmup_steps
    temperature = options.routing_temperature if options.final_temperature else None
    phases = []
    if options.uniform_steps:
        foundation = {"base": enabled["base"]}
        phases.append(Phase(steps=options.uniform_steps, mode="uniform", losses=foundation))
    if options.router_phase_steps:
        part = Phase(
            steps=options.router_phase_steps,
            mode=mode,
            losses=enabled,
            warmup_steps=warmup,
            temperature=temperature,
            train="router" if options.router_phase == "alone" else "experts",
        )
        phases.append(part)
        warmup = 0
    if options.final_temperature:
        temperature = Annealing(
            options.routing_temperature,
            options.final_temperature,
            options.temperature_steps,
            options.temperature_course,
        )
    return Schedule(
        [*phases, Phase(mode=mode, losses=enabled, warmup_steps=warmup, temperature=temperature)]
    )


def auxiliary_loss(model: nn.Module, options: TrainOptions) -> Tensor | float:
    """Return what keeps the router balanced and the experts apart, after a forward pass."""
    total: Tensor | float = 0.0
    decision = moe_lora.current_routing(model) if options.mixed else None
    if decision is not None and options.load_balancing_weight:
        balance = moe_lora.load_balancing_loss(decision.weights)
        total = total + options.load_balancing_weight * balance
    if decision is not None and options.router_z_weight:
        total = total + options.router_z_weight * moe_lora.router_z_loss(decision.logits)
    if decision is not None and options.entropy_floor_weight:
        decided = entropy_floor_loss(decision.weights, options.entropy_floor)
        total = total + options.entropy_floor_weight * decided
    if options.orthogonality_weight:
        total = total + options.orthogonality_weight * orthogonality_loss(model)
    return total


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
