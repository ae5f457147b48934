"""Fine-tune a nine-channel inpainting UNet on images with masks; for `accelerate launch`."""

from __future__ import annotations

import argparse
import itertools

import peft
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionInpaintPipeline
from diffusers.training_utils import cast_training_params
from masked_images import MaskedImages
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add(
        "--pretrained_model_name_or_path",
        default="stable-diffusion-v1-5/stable-diffusion-inpainting",
    )
    add("--data_dir", required=True, help="holds images/ and masks/ with equal file names")
    add("--prompt", default="", help="of all images")
    add("--output_dir", default="inpainting-unet-adapter")
    add("--rank", type=int, default=16)
    add("--resolution", type=int, default=512, help="a multiple of 64")
    add("--train_batch_size", type=int, default=4)
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true")
    add("--learning_rate", type=float, default=1e-4)
    add("--max_train_steps", type=int, default=1000)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], default=None)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


@torch.no_grad()
def encode_prompt(
    pipe: StableDiffusionInpaintPipeline, prompt: str, device: torch.device
) -> Tensor:
    """Encode the prompt once and drop the text encoder."""
    pipe.text_encoder.to(device)
    embeds: Tensor = pipe.encode_prompt(prompt, device, 1, False)[0]
    pipe.register_modules(text_encoder=None)
    return embeds


def to_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images in [-1, 1]."""
    latents: Tensor = vae.encode(images.to(vae.dtype)).latent_dist.sample()
    return latents * vae.config.scaling_factor


def noise_loss(
    unet: nn.Module,
    vae: AutoencoderKL,
    scheduler: DDPMScheduler,
    batch: dict[str, Tensor],
    embeds: Tensor,
) -> Tensor:
    """Return the loss of a batch at random timesteps."""
    image, mask = batch["image"], batch["mask"]
    with torch.no_grad():
        latents, masked = to_latents(vae, image), to_latents(vae, image * (1 - mask))
    small_mask = F.interpolate(mask.to(latents.dtype), size=latents.shape[2:])
    noise = torch.randn_like(latents)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    prediction = unet(
        torch.cat([noisy, small_mask, masked], dim=1),
        timesteps,
        encoder_hidden_states=embeds.expand(len(latents), -1, -1),
    )[0]
    by_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if by_velocity else noise
    return F.mse_loss(prediction.float(), target.float())


def main(argv: list[str] | None = None) -> None:
    """Train."""
    args = parse_args(argv)
    accumulation = GradientAccumulationPlugin(
        num_steps=args.gradient_accumulation_steps, sync_with_dataloader=False
    )
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_plugin=accumulation
    )
    set_seed(args.seed)
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = half.get(accelerator.mixed_precision, torch.float32)
    source = args.pretrained_model_name_or_path
    pipe = StableDiffusionInpaintPipeline.from_pretrained(source, dtype=dtype, safety_checker=None)
    scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
    embeds = encode_prompt(pipe, args.prompt, accelerator.device)
    vae = pipe.vae.requires_grad_(False).to(accelerator.device)
    unet = pipe.unet.requires_grad_(False).to(accelerator.device)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()

    config = peft.LoraConfig(
        r=args.rank,
        lora_alpha=args.rank,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    )
    unet.add_adapter(config)
    cast_training_params(unet)
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    images = MaskedImages(args.data_dir, args.resolution)
    loader = DataLoader(images, args.train_batch_size, shuffle=True)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)

    unet.train()
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    count = args.max_train_steps * args.gradient_accumulation_steps
    batches = itertools.islice(endless, count)
    progress = tqdm(batches, total=count, disable=not accelerator.is_main_process)
    for batch in progress:
        with accelerator.accumulate(unet), accelerator.autocast():
            loss = noise_loss(unet, vae, scheduler, batch, embeds)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        progress.set_postfix(loss=loss.item())

    if accelerator.is_main_process:
        accelerator.unwrap_model(unet).save_lora_adapter(args.output_dir)


if __name__ == "__main__":
    main()
