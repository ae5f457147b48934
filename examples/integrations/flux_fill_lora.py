"""Fine-tune FLUX.1 Fill on images with masks; start it with `accelerate launch`."""

from __future__ import annotations

import argparse
import itertools

import peft
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed
from diffusers import AutoencoderKL, FluxFillPipeline
from diffusers.training_utils import cast_training_params
from masked_images import MaskedImages
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default="black-forest-labs/FLUX.1-Fill-dev")
    add("--data_dir", required=True, help="holds images/ and masks/ with equal file names")
    add("--prompt", default="", help="of all images")
    add("--output_dir", default="flux-fill-adapter")
    add("--rank", type=int, default=16)
    add("--resolution", type=int, default=512, help="a multiple of 16")
    add("--guidance_scale", type=float, default=30.0)
    add("--train_batch_size", type=int, default=1)
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--gradient_checkpointing", action="store_true")
    add("--learning_rate", type=float, default=1e-4)
    add("--max_train_steps", type=int, default=1000)
    add("--mixed_precision", choices=["no", "bf16"], default=None)
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


@torch.no_grad()
def encode_prompt(pipe: FluxFillPipeline, prompt: str, device: torch.device) -> dict[str, Tensor]:
    """Encode the prompt once and drop the text encoders."""
    pipe.text_encoder.to(device)
    pipe.text_encoder_2.to(device)
    embeds, pooled, ids = pipe.encode_prompt(prompt, None, device=device)
    pipe.register_modules(text_encoder=None, text_encoder_2=None)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}


def to_latents(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode images in [-1, 1]."""
    latents: Tensor = vae.encode(images.to(vae.dtype)).latent_dist.sample()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def pack(latents: Tensor) -> Tensor:
    """Make a token of every 2x2 latents, as the transformer takes them."""
    tokens: Tensor = FluxFillPipeline._pack_latents(latents, *latents.shape)
    return tokens


def flow_loss(
    transformer: nn.Module,
    vae: AutoencoderKL,
    batch: dict[str, Tensor],
    prompt: dict[str, Tensor],
    guidance_scale: float | None,
) -> Tensor:
    """Return the flow-matching loss of a batch at random noise levels."""
    image, mask = batch["image"], batch["mask"]
    with torch.no_grad():
        latents, masked = to_latents(vae, image), to_latents(vae, image * (1 - mask))
    count, _, height, width = latents.shape
    noise = torch.randn_like(latents)
    sigma = latents.new_empty(count).normal_().sigmoid()
    noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1))
    cells = F.pixel_unshuffle(mask.to(latents.dtype), 8)
    velocity = transformer(
        torch.cat([pack(noisy), pack(masked), pack(cells)], dim=-1),
        timestep=sigma,
        guidance=None if guidance_scale is None else torch.full_like(sigma, guidance_scale),
        encoder_hidden_states=prompt["encoder_hidden_states"].expand(count, -1, -1),
        pooled_projections=prompt["pooled_projections"].expand(count, -1),
        txt_ids=prompt["txt_ids"],
        img_ids=FluxFillPipeline._prepare_latent_image_ids(
            count, height // 2, width // 2, latents.device, latents.dtype
        ),
    )[0]
    return F.mse_loss(velocity.float(), pack(noise - latents).float())


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
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    pipe = FluxFillPipeline.from_pretrained(args.pretrained_model_name_or_path, dtype=dtype)
    prompt = encode_prompt(pipe, args.prompt, accelerator.device)
    vae = pipe.vae.requires_grad_(False).to(accelerator.device)
    transformer = pipe.transformer.requires_grad_(False).to(accelerator.device)
    guidance_scale = args.guidance_scale if transformer.config.guidance_embeds else None
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()

    config = peft.LoraConfig(
        r=args.rank,
        lora_alpha=args.rank,
        target_modules=["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"],
    )
    transformer.add_adapter(config)
    cast_training_params(transformer)
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    images = MaskedImages(args.data_dir, args.resolution)
    loader = DataLoader(images, args.train_batch_size, shuffle=True)
    transformer, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)

    transformer.train()
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    count = args.max_train_steps * args.gradient_accumulation_steps
    batches = itertools.islice(endless, count)
    progress = tqdm(batches, total=count, disable=not accelerator.is_main_process)
    for batch in progress:
        with accelerator.accumulate(transformer), accelerator.autocast():
            loss = flow_loss(transformer, vae, batch, prompt, guidance_scale)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        progress.set_postfix(loss=loss.item())

    if accelerator.is_main_process:
        accelerator.unwrap_model(transformer).save_lora_adapter(args.output_dir)


if __name__ == "__main__":
    main()
