"""Measure a checkpoint on held-out triplets: a table, the predictions, a contact sheet, numbers.

python evaluate.py --data_dir data/test --checkpoint outputs/mine/checkpoint-1000

The folder --output_dir receives contact_sheet.png, metrics.json (every metric of every sample), and
images/MODEL/STEM.png, where MODEL is `trained` or `base`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from evaluation.by_kind import kind_table, measure_by_kind
from evaluation.comparison_sheet import draw_comparison
from evaluation.measuring import (
    Results,
    apply_to_all,
    describe_samples,
    measure,
    run_pipeline,
    table,
)
from evaluation.specialization import measure_specialization
from flux_fill.frozen_transformer import load_transformer
from flux_fill.kind_hints import KindHints
from flux_fill.models import Conditioner, load_checkpoint, load_pipeline, to_pil_images
from flux_fill.surroundings import add_surroundings_flags, check_surroundings
from image_io.options import add_reading_flags, options_from
from options.kind_options import HintForm
from options.parsing import parse_options
from options.train_options import BUNDLED_MODEL
from removal_data.checks.before_training import open_checked
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions

BASE, TRAINED = "base", "trained"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run_models(args: argparse.Namespace, dataset: RemovalDataset) -> dict[str, Results]:
    """Run the base model, the checkpoint, or both with the same noise, in the stock pipeline."""
    place = {"dtype": DTYPES[args.dtype], "device": args.device}
    pipe = load_pipeline(args.flux_fill_id, **place, transformer=False)
    conditioner = Conditioner(
        pipe,
        prompt=args.prompt,
        redux_id=args.flux_redux_id,
        redux_scale=args.redux_scale,
        captions=dataset.captions,
    )
    load_transformer(pipe, args.flux_fill_id, **place)
    settings = {
        "steps": args.steps,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "guidance_scale": args.guidance_scale,
    }
    found = {}
    if args.base_model or args.checkpoint is None:
        found[BASE] = run_pipeline(pipe, conditioner, dataset, **settings)
    if args.checkpoint is not None:
        load_checkpoint(pipe, args.checkpoint)
        hints = None
        if args.kind_experts:
            hints = KindHints(dataset.kinds, args.kind_experts, args.kind_hint)
        found[TRAINED] = run_pipeline(pipe, conditioner, dataset, hints=hints, **settings)
    surroundings = {name: getattr(args, name) for name in ("outside", "seam", "feather")}
    return {
        name: apply_to_all(pipe.vae, results, dataset.singles(), **surroundings)
        for name, results in found.items()
    }


def write_images(found: Results, dataset: RemovalDataset, folder: Path) -> None:
    """Write the predictions under the names of their samples."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, image in zip(dataset.stems, found.images, strict=True):
        path = folder / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil_images(image[None])[0].save(path)


def checkpoint_path(text: str) -> Path | None:
    """Return the path of a checkpoint, and None for `none`."""
    return None if text == "none" else Path(text)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data_dir", required=True, help="a folder, a manifest, or datasets:NAME")
    add(
        "--checkpoint",
        type=checkpoint_path,
        help="a folder checkpoint-N or checkpoint-best, a folder with an adapter, a LoRA file "
        "(.safetensors) that diffusers loads, or none, the default, for the base model alone",
    )
    add("--base_model", action="store_true", help="measure the base model beside the checkpoint")
    add(
        "--ablate_experts",
        nargs="+",
        metavar="CONFIG",
        help="measure losses and metrics without each expert, too; options of train.py as YAML "
        "files decide which losses, at which noise levels",
    )
    add("--kind_experts", nargs="+", metavar="KIND=EXPERT", help="as in training")
    add("--kind_hint", choices=get_args(HintForm), default="only", help="as in training")
    add("--skip_broken", action="store_true", help="leave out samples with errors")
    add("--output_dir", type=Path, default=Path("outputs") / "evaluation", help="where all goes")
    add("--rows", type=int, default=8, help="samples on the contact sheet")
    add("--flux_fill_id", default=str(BUNDLED_MODEL), help="the base model")
    add("--flux_redux_id", help="as in training")
    add("--redux_scale", type=float, default=1.0, help="as in training")
    add("--prompt", help="as in training")
    add("--guidance_scale", type=float, help="30 where the model reads one")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--seed", type=int, default=0, help="of the noise")
    add("--batch_size", type=int, default=8, help="samples of one size per call")
    add("--device", default="cuda" if cuda else "cpu", help="where to run")
    add("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32", help="of weights")
    add_surroundings_flags(parser)
    add_reading_flags(parser, DataOptions)
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; options that cannot be honored end the program with a message."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.checkpoint is None and (args.base_model or args.ablate_experts):
        parser.error("--base_model and --ablate_experts need --checkpoint")
    if args.kind_experts and args.checkpoint is None:
        parser.error("--kind_experts needs --checkpoint")
    if args.flux_redux_id is None and (args.redux_scale != 1 or args.redux_image != "ref"):
        parser.error("--redux_scale and --redux_image need --flux_redux_id")
    for name in ("steps", "batch_size", "rows"):
        if getattr(args, name) < 1:
            parser.error(f"expected --{name} to be >= 1, but got {getattr(args, name)}")
    try:
        check_surroundings(args)
        args.reading = options_from(args, DataOptions)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a program."""
    args = parse(arguments)
    output: Path = args.output_dir
    samples = open_checked(args.data_dir, args.reading, skip_broken=args.skip_broken)
    found, dataset = run_models(args, samples), samples.singles()
    means = {name: measure(results.images, dataset) for name, results in found.items()}
    names = ("steps", "seed", "outside", "seam", "feather")
    entries: dict[str, Any] = {name: getattr(args, name) for name in names} | {"psnr": means}
    entries["samples"] = {
        name: describe_samples(results, dataset) for name, results in found.items()
    }
    for name, results in found.items():
        write_images(results, dataset, output / "images" / name)
    images = {name: results.images for name, results in found.items()}
    draw_comparison(dataset, images, output / "contact_sheet.png", rows=args.rows)
    print(table(means))
    if dataset.kinds:
        by_kind = {name: measure_by_kind(each.images, dataset) for name, each in found.items()}
        entries["psnr_by_kind"] = by_kind
        print(f"\n{kind_table(list(by_kind.values())[-1], by_kind.get(BASE))}")
    if args.ablate_experts:
        given = ["--train_data_dir", str(args.data_dir), "--flux_fill_id", args.flux_fill_id]
        options = parse_options([*args.ablate_experts, *given])
        rises = measure_specialization(options, args.checkpoint, samples, steps=args.steps)
        entries["specialization"] = rises.as_dict()
        print(f"\n{rises}")
    (output / "metrics.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    print(f"Look at {output / 'contact_sheet.png'}.")


if __name__ == "__main__":
    main()
