"""Fine-tune an unconditional UNet for RePaint on images with masks, with Lightning."""

from __future__ import annotations

import argparse

import lightning
import peft
import torch
from diffusers import DDPMPipeline
from masked_images import MaskedImages
from torch import Tensor
from torch.utils.data import DataLoader


class Inpainting(lightning.LightningModule):
    """Learn to denoise, with more weight on what lies under the mask.

    Args:
        source: a folder or a hub id of a `DDPMPipeline`.
        rank: of the adapter.
        learning_rate: constant.
    """

    def __init__(self, source: str, rank: int, learning_rate: float) -> None:
        super().__init__()
        pipe = DDPMPipeline.from_pretrained(source)
        self.scheduler = pipe.scheduler
        self.learning_rate = learning_rate
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        )
        self.unet = peft.get_peft_model(pipe.unet, config).train()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        image, mask = batch["image"], batch["mask"]
        noise = torch.randn_like(image)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(image),), device=image.device)
        noisy = self.scheduler.add_noise(image, noise, timesteps)
        prediction = self.unet(noisy, timesteps).sample
        loss = ((prediction - noise).square() * (1 + mask)).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Optimize what the adapter trains."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.learning_rate, weight_decay=0.0)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--pretrained_model_name_or_path", default="google/ddpm-ema-celebahq-256")
    add("--data_dir", required=True, help="holds images/ and masks/ with equal file names")
    add("--output_dir", default="repaint-adapter")
    add("--rank", type=int, default=16)
    add("--resolution", type=int, default=256)
    add("--train_batch_size", type=int, default=4)
    add("--learning_rate", type=float, default=1e-4)
    add("--max_train_steps", type=int, default=1000)
    add("--precision", default="32-true", help="as Lightning's Trainer takes it")
    add("--accelerator", default="auto", help="as Lightning's Trainer takes it")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train."""
    args = parse_args(argv)
    lightning.seed_everything(args.seed)
    images = MaskedImages(args.data_dir, args.resolution)
    loader = DataLoader(images, args.train_batch_size, shuffle=True)
    module = Inpainting(args.pretrained_model_name_or_path, args.rank, args.learning_rate)
    trainer = lightning.Trainer(
        accelerator=args.accelerator,
        precision=args.precision,
        max_steps=args.max_train_steps,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        module.unet.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
