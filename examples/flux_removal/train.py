"""Train a mixture of LoRA experts to remove objects, with Flux Fill as the base model.

python train.py configs/routed.yaml --train_data_dir DATA --output_dir outputs/mine
accelerate launch train.py ...          the same on several devices
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

import moe_lora
from batches import CachedDataset, LatentEncoder, augment_masks, batch_stream, seed_at
from checkpoints import (
    Progress,
    find_checkpoint,
    load_model,
    load_training_state,
    read_progress,
    save_checkpoint,
)
from dataset import RemovalDataset
from interrupts import Interruption
from models import Conditioner, guidance_for, load_pipeline
from moe_lora import RemovalLoss, flow
from moe_lora.losses import ExpertSignals, RemovalLossOutput
from options import TrainOptions, parse_options
from parts import (
    Parts,
    auxiliary_loss,
    build_batches,
    build_loss,
    build_model,
    build_optimizer,
    build_schedule,
    order_of_data,
)
from reporting import Reporter

SMALLEST_SIGMA = 1e-3
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def training_step(
    batch: dict[str, Tensor], parts: Parts, loss: RemovalLoss, step: int = 0
) -> tuple[Tensor, RemovalLossOutput, Tensor]:
    """Run the model on a batch and compute the losses that are on.

    Args:
        batch: `src`, `result`, `ref` `(B, 3, H, W)` and `mask` `(B, 1, H, W)`, in [0, 1].
        parts: the models.
        loss: of the current phase.
        step: optimizer steps done.

    Returns:
        The loss to train by, what the removal loss found, and the noise levels `(B,)`.
    """
    options = parts.options
    latents = parts.encoder(batch)
    prompt_embeds, pooled_embeds = parts.conditioner(batch["ref"])
    sigma = draw_sigma(len(latents.x0), options).to(latents.x0.device)
    noise = torch.randn_like(latents.x0)
    x_t = flow.interpolate(latents.x0, noise, sigma)
    criterion, teaching = assign_signals(loss, sigma, parts)
    with teaching:
        velocity = parts.model(
            hidden_states=torch.cat([x_t, latents.condition], dim=-1),
            timestep=sigma.to(x_t.dtype),
            guidance=guidance_for(parts.pipe.transformer, options.guidance_scale, len(sigma)),
            pooled_projections=pooled_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=prompt_embeds.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=latents.image_ids,
            return_dict=False,
        )[0]
    output = criterion(
        velocity,
        flow.velocity(latents.x0, noise),
        x_t=x_t,
        sigma=sigma,
        mask=batch["mask"],
        target=batch["result"],
        height=latents.height,
        width=latents.width,
        step=step,
    )
    return output.total + auxiliary_loss(parts.model, options), output, sigma


def assign_signals(
    loss: RemovalLoss, sigma: Tensor, parts: Parts
) -> tuple[Callable[..., RemovalLossOutput], AbstractContextManager[None]]:
    """Return the loss, and the context that the model is called in.

    With `expert_signals` every sample gets one component, which trains its own expert.
    """
    if not (parts.options.expert_signals and loss.specialized):
        return loss, nullcontext()
    signals = ExpertSignals(loss)
    assignment = signals.assign(sigma)
    teaching = moe_lora.teach_experts(parts.model, signals.expert_grad_mask(assignment))
    return partial(signals, assignment=assignment), teaching


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


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch, its mask made of zeros and ones as the pipeline makes it."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return moved | {"mask": (moved["mask"] >= 0.5).float()}


def mask_curves(batch: dict[str, Tensor]) -> dict[str, float]:
    """Return what the mask analysis finds in a batch, on average."""
    info = moe_lora.extract_mask_info_from_batch(batch)
    names = ("area_ratio", "edge_complexity", "boundary_smoothness", "detail_complexity")
    return {f"mask/{name}": info[name].mean().item() for name in names}


def train(options: TrainOptions) -> Path:
    """Train as the options say.

    Returns:
        The folder of the last checkpoint.
    """
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(options.output_dir, logging_dir=options.logging_dir),
        # Uniform phases leave the router's parameters unused.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    folder = prepare_and_run(accelerator, options)
    # The process group must outlive DDP: gloo's, destroyed by DDP's reducer, may wait for itself.
    accelerator.free_memory()
    accelerator.end_training()
    return folder


def prepare_and_run(accelerator: Accelerator, options: TrainOptions) -> Path:
    """Build everything that a run needs, or restore it, and run."""
    set_seed(options.seed)
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    resumed = find_checkpoint(output_dir, options.resume_from_checkpoint)
    dtype = DTYPES[options.mixed_precision]
    pipe = load_pipeline(options.flux_fill_id, dtype=dtype, device=accelerator.device)
    conditioner = Conditioner(pipe, prompt=options.prompt, redux_id=options.flux_redux_id)
    model, encoder = build_model(pipe, options), LatentEncoder(pipe)
    loss = build_loss(options, pipe.vae)
    fresh = load_model(model, resumed) if resumed else []

    dataset = RemovalDataset(options.train_data_dir, reading=options)
    deal = build_batches(dataset, options, accelerator)
    data = order_of_data(options, accelerator, len(dataset))
    progress, note = read_progress(resumed, data) if resumed else (Progress(data=data), None)
    deal.start = progress.position
    source = CachedDataset(dataset, encoder) if options.cache_latents else dataset
    stream = batch_stream(source, deal, workers=options.dataloader_num_workers)
    steps_per_epoch = math.ceil(deal.batches_per_epoch / options.gradient_accumulation_steps)
    total_steps = options.max_train_steps or options.num_train_epochs * steps_per_epoch

    optimizer, scheduler = build_optimizer(model, options, progress.step, total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(options.seed, device_specific=True)
    reporter = Reporter(
        accelerator, options, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    if resumed:
        load_training_state(accelerator, model, optimizer, resumed)
        reporter.say(f"Going on from {resumed}, step {progress.step}.")
    elif options.resume_from_checkpoint:
        reporter.say(f"No checkpoint in {output_dir} yet: starting at step 0.")
    if fresh:
        reporter.say("The checkpoint has no router: it starts fresh.")
    if note:
        reporter.say(note, logging.WARNING)
    parts = Parts(accelerator, pipe, model, encoder, conditioner, options)
    return run(parts, loss, stream, optimizer, scheduler, progress, reporter)


def run(
    parts: Parts,
    loss: RemovalLoss,
    stream: Iterator[dict[str, Tensor]],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    progress: Progress,
    reporter: Reporter,
) -> Path:
    """Make the steps that are left, with log entries and checkpoints on the way."""
    accelerator, model, options = parts.accelerator, parts.model, parts.options
    output_dir, total_steps = Path(options.output_dir), reporter.total_steps
    schedule = build_schedule(options)
    folder = output_dir / f"checkpoint-{progress.step}"
    bar = tqdm(
        total=total_steps,
        initial=progress.step,
        desc="training",
        disable=not accelerator.is_main_process,
    )
    with Interruption() as interruption, bar:
        while progress.step < total_steps:
            mode = schedule.apply(model if options.mixed else None, loss, progress.step).mode
            batch = to_device(next(stream), accelerator.device)
            # Runs that differ in their model alone see the same noise.
            seed = seed_at(options.seed, progress.position, accelerator.process_index)
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            batch = augment_masks(batch, options.mask_augmentation, generator)
            with accelerator.accumulate(model):
                total, output, sigma = training_step(batch, parts, loss, progress.step)
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            progress.position += 1
            reporter.window.add(loss, output, total, sigma)
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            progress.step += 1
            bar.update()
            if progress.step % options.logging_steps == 0 or progress.step == total_steps:
                curves = mask_curves(batch) if options.enable_mask_info else {}
                curves["lr"] = scheduler.get_last_lr()[0]
                bar.set_postfix_str(reporter.entry(progress.step, model, mode, curves, batch))
            stopping = agree_to_stop(accelerator, interruption)
            due = progress.step % options.checkpointing_steps == 0
            if stopping or due or progress.step == total_steps:
                folder = save_checkpoint(
                    accelerator,
                    model,
                    optimizer,
                    progress,
                    output_dir,
                    limit=options.checkpoints_total_limit,
                )
            if stopping and progress.step < total_steps:
                reporter.say(
                    f"Stopped at step {progress.step} with {folder}. Go on with "
                    "--resume_from_checkpoint latest and otherwise the same options."
                )
                break
    return folder


def agree_to_stop(accelerator: Accelerator, interruption: Interruption) -> bool:
    """Tell whether any process was told to stop, so that all stop after the same step."""
    told = torch.tensor(float(interruption.requested), device=accelerator.device)
    return bool(accelerator.reduce(told, reduction="sum").item())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a program."""
    train(parse_options(arguments))


if __name__ == "__main__":
    main()
