"""Mask analysis beside one Sobel pass, and pixel losses as a share of a training step.

    python benchmarks/masks_and_losses.py

"peak" is by how much the memory in use rises at most. The step trains three routed experts in a
Flux Fill transformer; the share of a loss is 1 - (time of a step without any pixel loss) / (time of
a step with it). All rows of a table run interleaved in one process; figures are medians.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import kornia
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from flux_variants import ROUTED, SIZES, Size, Training, build, creating, make_inputs, mixture
from measuring import (
    DTYPES,
    MIB,
    Step,
    add_options,
    interleaved,
    machine,
    peak_bytes,
    print_table,
    tensors_of,
)
from torch import Tensor, nn

from moe_lora import RemovalLoss, flow, masks
from moe_lora.losses import LatentDecoder

SOBEL = "kornia Sobel pass"
BASE = "base"
PIXEL_LOSSES = ("boundary", "consistency", "detail")


def blobs(batch: int, side: int, device: str) -> Tensor:
    """Draw masks with smooth, ragged edges and different areas."""
    coarse = torch.randn(batch, 1, 9, 9, device=device)
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic")
    levels = torch.linspace(-0.3, 1.0, batch, device=device).view(-1, 1, 1, 1)
    return (smooth > levels).float()


def mask_steps(mask: Tensor, image: Tensor) -> dict[str, Step]:
    side = mask.shape[-1]
    return {
        SOBEL: lambda: kornia.filters.sobel(mask),
        "analyze(mask)": lambda: masks.analyze(mask),
        "analyze(mask, image)": lambda: masks.analyze(mask, image),
        "boundary_band": lambda: masks.boundary_band(mask, max(1, side // 64)),
        "to_tokens": lambda: masks.to_tokens(mask, (side // 16, side // 16)),
    }


@torch.no_grad()
def mask_rows(side: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    mask = blobs(args.mask_batch, side, args.device)
    image = torch.rand(args.mask_batch, 3, side, side, device=args.device)
    steps = mask_steps(mask, image)
    times = interleaved(steps, args.rounds, warmup=args.warmup, device=args.device)
    return [
        {
            "masks": f"{args.mask_batch} x {side}²",
            "what": name,
            "seconds": times.seconds(name),
            "masks/s": args.mask_batch / times.seconds(name),
            "/ Sobel": times.ratio(name, SOBEL),
            "peak": peak_bytes(step, args.device),
        }
        for name, step in steps.items()
    ]


def build_vae(width: int, device: str, dtype: torch.dtype) -> AutoencoderKL:
    """Build the autoencoder of Flux at another width; 128 is the real one."""
    with creating(device, dtype):
        return AutoencoderKL(
            latent_channels=16,
            block_out_channels=(width, 2 * width, 4 * width, 4 * width),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=min(32, width),
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )


class LossStep(Training):
    """Run training steps with a `RemovalLoss` at noise levels that let every sample through."""

    def __init__(
        self, model: nn.Module, inputs: dict[str, Tensor], grid: int, loss: RemovalLoss
    ) -> None:
        hidden = inputs["hidden_states"]
        self.x_t, self.side, self.loss = hidden[..., :64], 2 * grid, loss
        self.sigma = torch.linspace(0.2, 0.6, len(hidden), device=hidden.device)
        super().__init__(model, {**inputs, "timestep": self.sigma.to(hidden.dtype)})
        self.mask = masks.from_flux_fill(hidden, 16 * grid, 16 * grid).float()
        self.image = torch.rand(len(hidden), 3, 16 * grid, 16 * grid, device=hidden.device)
        decoder = loss.decoder.vae if isinstance(loss.decoder, LatentDecoder) else nn.Module()
        self.beside += [*tensors_of(decoder), self.mask, self.image, self.sigma]

    def forward(self) -> Tensor:
        return self.loss(
            self.model(**self.inputs, return_dict=False)[0],
            self.target,
            x_t=self.x_t,
            sigma=self.sigma,
            mask=self.mask,
            target=self.image,
            height=self.side,
            width=self.side,
        ).total


def losses(vae: AutoencoderKL) -> dict[str, RemovalLoss]:
    decoder = LatentDecoder(vae, dtype=None)
    off = dict.fromkeys(PIXEL_LOSSES)
    found = {BASE: RemovalLoss(**off)}
    for name in PIXEL_LOSSES:
        found[f"base and {name}"] = RemovalLoss(**{**off, name: 0.3}, decoder=decoder)
    found["all"] = RemovalLoss(decoder=decoder)
    checkpointed = LatentDecoder(vae, dtype=None, checkpoint=True)
    found["all, decoder checkpointed"] = RemovalLoss(decoder=checkpointed)
    return found


def loss_rows(size: Size, args: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = DTYPES[args.dtype]
    base = build(size, args.device, dtype)
    inputs = make_inputs(size, args.device, dtype)
    vae = build_vae(args.vae_width, args.device, dtype)
    model = mixture(base, args.rank, **ROUTED)
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    steps = {name: LossStep(model, inputs, size.grid, loss) for name, loss in losses(vae).items()}
    latents = flow.unpack_latents(steps[BASE].x_t, 2 * size.grid, 2 * size.grid)
    decode = partial(torch.no_grad()(LatentDecoder(vae, dtype=None)), latents)
    times = interleaved(
        {**steps, "decode": decode}, args.rounds, warmup=args.warmup, device=args.device
    )
    return [
        {
            "loss": name,
            "seconds": times.seconds(name),
            "/ base": times.ratio(name, BASE),
            "share": 1 - times.ratio(BASE, name),
            "peak": peak_bytes(step, args.device),
            "saved": step.saved(),
        }
        for name, step in steps.items()
    ] + [{"loss": "(a decoding without gradient)", "seconds": times.seconds("decode")}]


def shown(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if column in ("peak", "saved"):
        return f"{value / MIB:.1f}"
    if column == "masks/s":
        return f"{value:.0f}"
    if isinstance(value, float):
        return f"{value:.4f}" if column == "seconds" else f"{value:.2f}"
    return str(value)


def report(rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    print_table(columns, ([shown(row, column) for column in columns] for row in rows))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds=9)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--sides", type=int, nargs="*", default=[512, 1024], help="of masks")
    parser.add_argument("--mask_batch", type=int, default=16)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the transformer")
    parser.add_argument("--rank", type=int, default=16, help="of each expert")
    parser.add_argument("--vae_width", type=int, default=32, help="128 is that of Flux")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    told = machine(args.device, ("torch", "kornia", "diffusers"))
    print(f"{told}\n\nMasks in float32; memory in MiB\n")
    mask_table = [row for side in args.sides for row in mask_rows(side, args)]
    report(mask_table)
    size = SIZES[args.size]
    print(
        f"\nA training step, {args.size} ({size}), {args.dtype}, autoencoder {args.vae_width} "
        f"wide, {16 * size.grid}² pixels; memory in MiB\n"
    )
    loss_table = loss_rows(size, args)
    report(loss_table)
    if args.json:
        result = {"machine": told, "options": vars(args), "masks": mask_table, "losses": loss_table}
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
