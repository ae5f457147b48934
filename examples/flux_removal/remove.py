"""Remove objects from an image, or from all images of a folder, with a trained checkpoint.

python remove.py --image photo.png --mask mask.png --checkpoint outputs/mine/checkpoint-1000
python remove.py --image photos --mask masks --output removed --checkpoint CHECKPOINT

The exit code is 0 when all images were written, 1 when some were skipped, and 2 when all were.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxFillPipeline
from tqdm.auto import tqdm

from flux_fill.inference_memory import (
    add_memory_flags,
    check_memory_flags,
    load_trained_transformer,
)
from flux_fill.kind_hints import set_task_hint
from flux_fill.models import Conditioner, load_pipeline
from flux_fill.surroundings import add_surroundings_flags, check_surroundings
from image_io.options import ReadingOptions, add_reading_flags, reading_options
from image_io.padding import MULTIPLE
from image_io.writing import write_image
from object_removal.crops import RemovalSettings, remove_from_photograph
from object_removal.files import Job, find_jobs, without_existing
from object_removal.inputs import Inputs, read_all
from options.train_options import BUNDLED_MODEL
from removal_data.references import REFERENCES
from removal_data.sources.samples import raise_first

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

ALL, SOME, NONE = 0, 1, 2


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True, help="an image, or a folder of images")
    parser.add_argument(
        "--mask",
        type=Path,
        help="white = remove; for a folder of images, one mask for all or a folder with masks by "
        "name. By default the folder mask beside src in --image, files beside the images whose "
        "names end with _mask or _M, or what is transparent in an image",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder checkpoint-N")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("removed"),
        help="the result, by default in the format of the image; for a folder of images, a folder",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    parser.add_argument(
        "--skip_existing", action="store_true", help="leave out images whose outputs exist"
    )
    parser.add_argument(
        "--fail_fast",
        action="store_true",
        help="stop at the first image of a folder that cannot be used, instead of skipping it",
    )
    parser.add_argument("--flux_fill_id", default=str(BUNDLED_MODEL), help="the base model")
    parser.add_argument("--flux_redux_id", help="as in training")
    parser.add_argument("--redux_scale", type=float, default=1.0, help="as in training")
    parser.add_argument("--ref", type=Path, help="the reference for Redux and --diptych")
    parser.add_argument(
        "--redux_image",
        choices=REFERENCES,
        default="masked_source",
        help="what Redux encodes without --ref; the object is in neither",
    )
    parser.add_argument(
        "--diptych", action="store_true", help="lay --ref beside the image, as in training"
    )
    parser.add_argument("--prompt", help="as in training")
    parser.add_argument("--task_hint", help="for the router, such as removal_focus or shadow_only")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument(
        "--seeds",
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="of the noise; with several, an output NAME_seedN for each",
    )
    parser.add_argument("--guidance_scale", type=float, help="30 where the model reads one")
    parser.add_argument(
        "--resolution",
        type=int,
        help="larger images are cropped around the mask, to about resolution x resolution pixels "
        "at which the model runs; the size that the VAE is made for by default",
    )
    parser.add_argument(
        "--crop_context",
        type=float,
        default=1.0,
        help="surroundings of the mask in a crop, on each side, in longer sides of its box",
    )
    add_reading_flags(parser)
    add_surroundings_flags(parser)
    add_memory_flags(parser)
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="where to run")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16" if cuda else "fp32", help="of weights"
    )
    return parser


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, ReadingOptions]:
    """Read the command line; what cannot be honored ends the program with a message."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.diptych and args.ref is None:
        parser.error("--diptych needs --ref")
    if args.ref is not None and args.flux_redux_id is None and not args.diptych:
        parser.error("--ref needs --flux_redux_id or --diptych, which read it")
    if args.redux_image != "masked_source" and (args.ref or not args.flux_redux_id):
        parser.error("--redux_image needs --flux_redux_id, and no --ref")
    if args.redux_scale != 1 and args.flux_redux_id is None:
        parser.error("--redux_scale needs --flux_redux_id")
    if args.steps < 1:
        parser.error(f"expected --steps to be >= 1, but got {args.steps}")
    for name in ("mask_label", "resize_mask", "threshold_mask"):
        if args.mask is None and getattr(args, name) not in (None, False):
            parser.error(f"--{name} needs --mask, which is what it reads")
    if not args.image.is_dir() and (args.skip_existing or args.fail_fast):
        parser.error("--skip_existing and --fail_fast need a folder as --image")
    if args.overwrite and args.skip_existing:
        parser.error("--overwrite and --skip_existing exclude each other")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"expected different --seeds, but got {args.seeds}")
    if args.resolution is not None and args.resolution < MULTIPLE:
        parser.error(f"expected --resolution to be >= {MULTIPLE}, but got {args.resolution}")
    if not 0 <= args.crop_context < math.inf:
        parser.error(f"expected --crop_context to be >= 0, but got {args.crop_context}")
    try:
        check_surroundings(args)
        check_memory_flags(args)
        return args, reading_options(args)
    except ValueError as error:
        parser.error(str(error))


def load_model(args: argparse.Namespace) -> tuple[FluxFillPipeline, Conditioner]:
    """Load what encodes the prompt, encode it, and load the transformer with its checkpoint."""
    dtype = DTYPES[args.dtype]
    pipe = load_pipeline(args.flux_fill_id, dtype=dtype, device=args.device, transformer=False)
    conditioner = Conditioner(
        pipe, prompt=args.prompt, redux_id=args.flux_redux_id, redux_scale=args.redux_scale
    )
    load_trained_transformer(pipe, args, dtype)
    set_task_hint(pipe.transformer, args.task_hint)
    return pipe, conditioner


def edit_all(
    args: argparse.Namespace, jobs: Sequence[Job], read: Callable[..., Iterator[tuple[Job, Inputs]]]
) -> list[Path]:
    """Edit all images with one model; return the files that were written.

    Args:
        args: of the command line.
        jobs: the images.
        read: yields those that can be used, with their content.
    """
    pipe, conditioner = load_model(args)
    settings = RemovalSettings(
        **{field.name: getattr(args, field.name) for field in fields(RemovalSettings)}
    )
    written: list[Path] = []
    count = sum(len(job.outputs) for job in jobs)
    pipe.set_progress_bar_config(disable=count > 1)
    with tqdm(total=count, desc="removing", unit="image", disable=count == 1) as bar:
        for _, inputs in read(jobs):
            image, mask, ref = inputs.image.rgb, inputs.mask, inputs.ref
            for seed, output in inputs.outputs.items():
                result = remove_from_photograph(
                    pipe, conditioner, image, mask, settings, seed=seed, ref=ref
                )
                write_image(result, output, inputs.image, inputs.exif)
                written.append(output)
                bar.update()
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program."""
    args, options = parse(arguments)
    fail_fast = args.fail_fast or not args.image.is_dir()
    jobs, findings = find_jobs(args.image, args.mask, args.ref, args.output, args.seeds)
    if fail_fast:
        raise_first(findings)
    skipped = [finding.text for finding in findings]
    if args.skip_existing:
        jobs = without_existing(jobs)
    read = partial(
        read_all, options=options, skipped=skipped, overwrite=args.overwrite, fail_fast=fail_fast
    )
    # What is wrong with files is known before the model is loaded.
    jobs = [job for job, _ in read(tqdm(jobs, "checking", disable=len(jobs) == 1))]
    written = edit_all(args, jobs, read) if jobs else []
    for reason in skipped:
        print(f"Skipped: {reason}", file=sys.stderr)
    print(f"Wrote {written[0] if len(written) == 1 else f'{len(written)} images'}.")
    return (SOME if written else NONE) if skipped else ALL


if __name__ == "__main__":
    sys.exit(main())
