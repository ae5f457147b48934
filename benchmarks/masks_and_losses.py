"""Mask analysis beside one Sobel pass, and pixel losses as a share of a training step.

    python benchmarks/masks_and_losses.py

"peak" is by how much the memory in use rises at most. The step trains three routed experts in a
Flux Fill transformer; the share of a loss is 1 - (time of a step without any pixel loss) / (time of
a step with it). All rows of a table run interleaved in one process; figures are medians.

The last table decodes a picture and goes back from the three pixel losses to the latents, with a
mask of a quarter of the picture, in the ways that `LatentDecoder` and `window_margin` offer.
"off by" is the greatest difference of a pixel (in [0, 1]) from the whole decoding. "cosine" is
that of the gradient inside the window with the whole decoding's gradient there; pixels outside the
window, which only the consistency loss looks at, give none by definition, and are left out of
both. The cosine is measured on the bundled, trained autoencoder, since in a random one nearly all
of the gradient flows through statistics; it has no attention in the middle.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kornia
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from flux_variants import ROUTED, SIZES, Size, Training, build, make_inputs, mixture
from measuring import (
    DTYPES,
    MIB,
    Step,
    add_options,
    interleaved,
    machine,
    peak_bytes,
    table,
    tensors_of,
)
from pixel_losses import build_vae, pixel_rows
from torch import Tensor, nn

from moe_lora import RemovalLoss, flow, masks
from moe_lora.losses import ExpertSignals, LatentDecoder
from moe_lora.routing import teach_experts

SOBEL = "kornia Sobel pass"
BASE = "base"
Table = tuple[str, list[dict[str, Any]]]
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
        return self.total(self.model(**self.inputs, return_dict=False)[0], self.loss)

    def total(self, velocity: Tensor, loss: Callable[..., Any]) -> Tensor:
        return loss(
            velocity,
            self.target,
            x_t=self.x_t,
            sigma=self.sigma,
            mask=self.mask,
            target=self.image,
            height=self.side,
            width=self.side,
        ).total


class SignalStep(LossStep):
    """Run the same steps with every sample's gradient for one component and its expert."""

    def forward(self) -> Tensor:
        signals = ExpertSignals(self.loss)
        assignment = signals.assign(self.sigma)
        with teach_experts(self.model, signals.expert_grad_mask(assignment)):
            velocity = self.model(**self.inputs, return_dict=False)[0]
        return self.total(velocity, partial(signals, assignment=assignment))


def losses(vae: AutoencoderKL) -> dict[str, RemovalLoss]:
    decoder = LatentDecoder(vae, dtype=None)
    off: dict[str, Any] = dict.fromkeys(PIXEL_LOSSES)
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
    everything = steps["all"].loss
    steps["all, expert signals"] = SignalStep(model, inputs, size.grid, everything)
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
            "/ all": times.ratio(name, "all"),
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
        if column == "off by":
            return f"{value:.0e}"
        return f"{value:.4f}" if column in ("seconds", "cosine") else f"{value:.2f}"
    return str(value)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return figures as a Markdown table."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return table(columns, ([shown(row, column) for column in columns] for row in rows))


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
    parser.add_argument("--pixel_side", type=int, default=512, help="of the last table's picture")
    parser.add_argument("--pixel_rounds", type=int, default=3)
    parser.add_argument("--margins", type=int, nargs="*", default=[2, 4], help="of windows")
    parser.add_argument(
        "--tables", nargs="*", choices=TABLES, default=list(TABLES), help="all by default"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    told = machine(args.device, ("torch", "kornia", "diffusers"))
    print(told)
    result: dict[str, Any] = {"machine": told, "options": vars(args)}
    for name in args.tables:
        title, rows = TABLES[name](args)
        print(f"\n{title}; memory in MiB\n")
        print(table_of(rows))
        result[name] = rows
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


def mask_table(args: argparse.Namespace) -> Table:
    return "Masks in float32", [row for side in args.sides for row in mask_rows(side, args)]


def loss_table(args: argparse.Namespace) -> Table:
    size = SIZES[args.size]
    title = (
        f"A training step, {args.size} ({size}), {args.dtype}, autoencoder {args.vae_width} "
        f"wide, {16 * size.grid}² pixels"
    )
    return title, loss_rows(size, args)


def pixel_table(args: argparse.Namespace) -> Table:
    title = (
        f"Pixel losses alone, {args.dtype}, autoencoder {args.vae_width} wide, "
        f"{args.pixel_side}² pixels, a quarter masked"
    )
    return title, pixel_rows(args)


TABLES: dict[str, Callable[[argparse.Namespace], Table]] = {
    "masks": mask_table,
    "losses": loss_table,
    "windows": pixel_table,
}


if __name__ == "__main__":
    main()
