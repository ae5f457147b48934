"""Train a mixture of LoRA experts to remove objects, with Flux Fill as the base model.

python train.py configs/routed.yaml --train_data_dir DATA --output_dir outputs/mine
accelerate launch train.py ...          the same on several devices
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from flux_fill.models import Conditioner, load_pipeline
from moe_lora import RemovalLoss, flow
from moe_lora.losses import RemovalLossOutput
from options.parsing import parse_options
from options.train_options import TrainOptions
from options.yaml_files import write_options
from removal_data.batches import (
    LatentEncoder,
    augment_masks,
    image_sizes,
    seed_at,
    to_device,
)
from removal_data.dataset import RemovalDataset
from reporting.reporter import Reporter, mask_curves
from training_run.averaging import WeightAverage
from training_run.checkpoints import (
    Progress,
    find_checkpoint,
    load_training_state,
    read_progress,
    restore_weights,
    save_checkpoint,
)
from training_run.data import open_data
from training_run.forward import predict_velocity
from training_run.hub import open_repository, upload_result
from training_run.interrupts import Interruption
from training_run.losses import assign_signals, auxiliary_loss, build_loss, draw_sigma
from training_run.model_card import ModelCardWriter
from training_run.parts import (
    DTYPES,
    Parts,
    Run,
    build_accelerator,
    build_hints,
    build_model,
    build_optimizer,
    load_base,
)
from training_run.plan import describe, plan_run
from training_run.schedule import build_schedule
from training_run.timing import StepClock, describe_rest
from training_run.validation import Validator

__all__ = ["main", "parse_options", "train"]


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
    prompt = parts.conditioner.of_batch(batch)
    sigma = draw_sigma(len(latents.x0), options).to(latents.x0.device)
    noise = torch.randn_like(latents.x0)
    x_t = flow.interpolate(latents.x0, noise, sigma)
    criterion, teaching = assign_signals(parts.model, loss, sigma, options)
    with teaching:
        velocity = predict_velocity(parts.model, parts, latents, x_t, sigma, prompt)
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
    labels = parts.hints.labels(batch["kind"], options.experts) if parts.hints else None
    return output.total + auxiliary_loss(parts.model, options, labels), output, sigma


def optimizer_step(run: Run) -> dict[str, Tensor] | None:
    """Train on the next batch.

    Returns:
        The batch, or `None` as long as gradients are accumulated.
    """
    parts, progress = run.parts, run.progress
    accelerator, model, options = parts.accelerator, parts.model, parts.options
    batch = to_device(next(run.stream), accelerator.device)
    # Runs that differ in their model alone see the same noise.
    seed = seed_at(options.seed, progress.position, accelerator.process_index)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    batch = augment_masks(batch, options.mask_augmentation, generator, diptych=options.diptych)
    hinted = parts.hints.given(model, batch, generator) if parts.hints else nullcontext()
    with accelerator.accumulate(model), hinted:
        total, output, sigma = training_step(batch, parts, run.loss, progress.step)
        accelerator.backward(total)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
    progress.position += 1
    run.reporter.window.add(run.loss, output, total, sigma)
    if not accelerator.sync_gradients:
        return None
    run.scheduler.step()
    if run.average is not None:
        run.average.update()
    progress.step += 1
    return batch


def fit(run: Run) -> Path:
    """Make the steps that are left, with log entries and checkpoints on the way.

    Returns:
        The folder of the last checkpoint.
    """
    parts, progress, reporter = run.parts, run.progress, run.reporter
    accelerator, model, options = parts.accelerator, parts.model, parts.options
    schedule, output_dir = build_schedule(options), Path(options.output_dir)
    folder = output_dir / f"checkpoint-{progress.step}"
    clock = StepClock(accelerator.device)
    if progress.step == 0:
        run.validate()
    with Interruption() as interruption, reporter.progress_bar(progress.step) as bar:
        while progress.step < reporter.total_steps:
            adapted = model if options.mixed else None
            mode = schedule.apply(adapted, run.loss, progress.step).mode
            assert mode is not None  # every phase of `build_schedule` has one
            with clock.measuring():
                batch = optimizer_step(run)
            if batch is None:
                continue
            bar.update()
            if (seconds := clock.count()) is not None:
                reporter.say(describe_rest(run, seconds))
            last = progress.step == reporter.total_steps
            if last or progress.step % options.logging_steps == 0:
                curves = mask_curves(batch) if options.enable_mask_info else {}
                curves["lr"] = float(run.scheduler.get_last_lr()[0])
                bar.set_postfix_str(reporter.entry(progress.step, model, mode, curves, batch))
            run.validate()
            stopping = interruption.agreed(accelerator)
            if last or stopping or progress.step % options.checkpointing_steps == 0:
                limit = options.checkpoints_total_limit
                folder = save_checkpoint(run, output_dir, limit=limit)
            if stopping and not last:
                reporter.say(
                    f"Stopped at step {progress.step} with {folder}. Go on with "
                    "--resume_from_checkpoint latest and otherwise the same options."
                )
                break
    return folder


def prepare(accelerator: Accelerator, options: TrainOptions) -> Run:
    """Build everything that a run needs, or restore it from its checkpoint."""
    set_seed(options.seed)
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    resumed = find_checkpoint(output_dir, options.resume_from_checkpoint)
    repository = open_repository(options, accelerator)
    if accelerator.is_main_process:
        write_options(options)

    data = open_data(options, accelerator)
    hints, scenes = build_hints(options, data.kinds), data.validation
    scene_hints = build_hints(options, scenes.kinds, training=False) if scenes else None

    dtype = DTYPES[options.mixed_precision]
    device = accelerator.device
    pipe = load_pipeline(options.flux_fill_id, dtype=dtype, device=device, transformer=False)
    conditioner = Conditioner(
        pipe,
        prompt=options.prompt,
        redux_id=options.flux_redux_id,
        redux_scale=options.redux_scale,
        captions=data.captions,
    )
    start, encoder = Progress(data=data.order), LatentEncoder(pipe)
    progress, note = read_progress(resumed, data.order) if resumed else (start, None)
    stream = data.stream(progress.position, encoder, conditioner)
    if options.cache_latents:
        conditioner.rest()

    # What encodes prompts has left the device, so that it never shares it with the transformer.
    load_base(pipe, options, device)
    model, loss = build_model(pipe, options, device), build_loss(options, pipe.vae)
    decay, averages = options.ema_decay, None
    notes: list[str] = []
    if resumed:
        notes, averages = restore_weights(model, resumed, with_average=decay is not None)

    optimizer, scheduler = build_optimizer(model, options, progress.step, data.total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain = accelerator.unwrap_model(model)
    average = None if decay is None else WeightAverage(plain, decay, averages)
    set_seed(options.seed, device_specific=True)
    reporter = Reporter(
        accelerator,
        options,
        total_steps=data.total_steps,
        steps_per_epoch=data.steps_per_epoch,
    )
    if resumed:
        load_training_state(accelerator, model, optimizer, resumed, average)
        reporter.say(f"Going on from {resumed}, step {progress.step}.")
    elif options.resume_from_checkpoint:
        reporter.say(f"No checkpoint in {output_dir} yet: starting at step 0.")
    if options.mixed and not options.compose:
        for line in describe(plan_run(options, 0, 0, steps=False)).splitlines():
            reporter.say(f"Plan: {line}")
    for text in notes:
        reporter.say(text)
    if data.captions and not conditioner.texts:
        reader = "Redux is the prompt" if options.flux_redux_id else "the model reads no texts"
        reporter.say(f"The captions of the data are not used: {reader}.", logging.WARNING)
    if note:
        reporter.say(note, logging.WARNING)
    parts = Parts(accelerator, pipe, model, encoder, conditioner, options, hints)
    card = ModelCardWriter(options, data.description, data.total_steps, repository)
    run = Run(parts, loss, stream, optimizer, scheduler, progress, reporter, card, average)
    if scenes is not None:
        run.validator = Validator(parts, scenes, reporter, card, scene_hints)
    return run


def train(options: TrainOptions) -> Path:
    """Train as the options say.

    Returns:
        The folder of the last checkpoint.
    """
    accelerator = build_accelerator(options)
    run = prepare(accelerator, options)
    folder = fit(run)
    upload_result(run, folder)
    # The process group must outlive DDP: gloo's, destroyed by DDP's reducer, may wait for itself.
    accelerator.free_memory()
    accelerator.end_training()
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a program."""
    options = parse_options(arguments)
    if options.plan:
        dataset = RemovalDataset(
            options.train_data_dir, reading=options, batch_size=options.batch_size
        )
        width, height = max(image_sizes(dataset), key=math.prod)
        print(describe(plan_run(options, height, width)))
    else:
        train(options)


if __name__ == "__main__":
    main()
