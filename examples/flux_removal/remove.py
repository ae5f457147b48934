"""Remove an object from an image with a trained checkpoint, through the stock Fill pipeline.

python remove.py --image photo.png --mask mask.png --checkpoint outputs/mine/checkpoint-1000
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxFillPipeline
from PIL import Image

from flux_fill.inference_memory import (
    add_memory_flags,
    check_memory_flags,
    load_trained_transformer,
)
from flux_fill.models import (
    Conditioner,
    guidance_for,
    load_pipeline,
    to_pil_images,
)
from flux_fill.surroundings import (
    add_surroundings_flags,
    apply_surroundings,
    check_surroundings,
)
from image_io.mask_reading import mask_from_alpha, read_mask
from image_io.metadata import read_exif
from image_io.options import ReadingOptions, add_reading_flags, reading_options
from image_io.padding import MULTIPLE, pad_to_multiple
from image_io.reading import LoadedImage, read_image
from image_io.writing import check_output, default_suffix, write_image
from options.train_options import BUNDLED_MODEL
from removal_data.references import REFERENCES

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def remove_object(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    image: Image.Image,
    mask: Image.Image,
    *,
    steps: int = 20,
    seed: int = 0,
    guidance_scale: float | None = None,
    ref: Image.Image | None = None,
    redux_image: str = "masked_source",
    diptych: bool = False,
) -> Image.Image:
    """Return the image with what the mask covers, and its shadow, removed.

    The image is padded to multiples of 16 pixels, never resized, and the result is cropped to
    its size.

    Args:
        pipe: the stock pipeline; with a checkpoint loaded its transformer routes by itself.
        conditioner: makes the prompt embeddings.
        image: mode RGB.
        mask: mode L, 0 and 255, of the same size; white = remove.
        steps: of denoising.
        seed: of the noise.
        guidance_scale: for models with guidance embeddings; 30 when `None`.
        ref: the reference; `None` for one made of the image without the object.
        redux_image: the one that is made, see `removal_data.references`.
        diptych: lay `ref`, scaled to the image's size, left of the image during inference.
    """
    guidance = guidance_for(pipe.transformer, guidance_scale, 1)
    padded, padded_mask = pad_to_multiple(image, mask)
    if ref is None:
        reference = REFERENCES[redux_image](*(to_tensor(part) for part in (image, mask)))
    else:
        reference = to_tensor(ref)
    prompt_embeds, pooled_embeds = conditioner(reference[None])
    left = 0
    if diptych and ref is not None:
        padded, padded_mask = lay_beside(ref, padded, padded_mask)
        left = padded.width // 2
    result: Image.Image = pipe(
        image=padded,
        mask_image=padded_mask,
        height=padded.height,
        width=padded.width,
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled_embeds,
        guidance_scale=0.0 if guidance is None else guidance.item(),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return result.crop((left, 0, left + image.width, image.height))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Turn an image into `(C, H, W)`, in [0, 1]."""
    return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1) / 255


def lay_beside(
    ref: Image.Image, image: Image.Image, mask: Image.Image
) -> tuple[Image.Image, Image.Image]:
    """Return image and mask with the reference left of them, in which nothing is removed."""
    size = (2 * image.width, image.height)
    both, wide = Image.new("RGB", size), Image.new("L", size)
    both.paste(ref.resize(image.size, Image.Resampling.LANCZOS))
    both.paste(image, (image.width, 0))
    wide.paste(mask, (image.width, 0))
    return both, wide


def surround(
    pipe: FluxFillPipeline,
    result: Image.Image,
    image: Image.Image,
    mask: Image.Image,
    *,
    outside: str,
    seam: float,
    feather: int,
) -> Image.Image:
    """Decide what becomes of the image outside the mask, and of the seam along its edge.

    Args:
        pipe: what made the result; its VAE is asked.
        result: of `remove_object`.
        image: mode RGB, the source of the result.
        mask: mode L, 0 and 255; white = remove.
        outside: one of `flux_fill.surroundings.OUTSIDE`.
        seam: strength of the seam correction, in [0, 1].
        feather: pixels around the mask in which `paste` blends result and image.
    """
    prediction, source, where = (
        torch.from_numpy(np.atleast_3d(np.array(value))).permute(2, 0, 1)[None] / 255
        for value in (result, image, mask)
    )
    finished = apply_surroundings(
        pipe.vae, prediction, source, where, outside=outside, seam=seam, feather=feather
    )
    return to_pil_images(finished)[0]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True, help="the image")
    parser.add_argument(
        "--mask", type=Path, help="white = remove; what is transparent in the image by default"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder checkpoint-N")
    parser.add_argument(
        "--output", type=Path, help="the result; removed.png by default, in the image's format"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="let --output be one of the files that are read"
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
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--guidance_scale", type=float, help="30 where the model reads one")
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
    try:
        check_surroundings(args)
        check_memory_flags(args)
        return args, reading_options(args)
    except ValueError as error:
        parser.error(str(error))


def read_inputs(
    args: argparse.Namespace, options: ReadingOptions
) -> tuple[LoadedImage, Image.Image, bytes | None]:
    """Return the image, its mask in mode L, and its EXIF data, once `args.output` is checked.

    Raises:
        FileNotFoundError, ValueError: when a file cannot be read, or the mask is empty.
        FileExistsError, OSError, ValueError: when the output cannot be written.
    """
    loaded, exif = read_image(args.image, options.background or "white"), read_exif(args.image)
    args.output = args.output or Path("removed").with_suffix(default_suffix(loaded))
    if args.mask is None:
        mask = mask_from_alpha(loaded, options)
        # What was transparent is filled, so that the result is opaque.
        loaded = dataclasses.replace(loaded, rgb=loaded.bare, alpha=None)
    else:
        mask = read_mask(args.mask, loaded.rgb.size, options, image=args.image)
    if not mask.any():
        raise ValueError(
            f"Expected something to remove in the mask {args.mask or args.image}, but it is empty. "
            "Pass --invert_mask if black means remove."
        )
    check_output(
        args.output,
        loaded,
        [path for path in (args.image, args.mask, args.ref) if path is not None],
        exif=exif,
        overwrite=args.overwrite,
        flatten=options.background is not None,
    )
    return loaded, Image.fromarray(mask.astype(np.uint8) * 255), exif


def load_model(args: argparse.Namespace) -> tuple[FluxFillPipeline, Conditioner]:
    """Load what encodes the prompt, encode it, and load the transformer with its checkpoint."""
    dtype = DTYPES[args.dtype]
    pipe = load_pipeline(args.flux_fill_id, dtype=dtype, device=args.device, transformer=False)
    conditioner = Conditioner(
        pipe, prompt=args.prompt, redux_id=args.flux_redux_id, redux_scale=args.redux_scale
    )
    load_trained_transformer(pipe, args, dtype)
    return pipe, conditioner


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a program."""
    args, options = parse(arguments)
    loaded, mask, exif = read_inputs(args, options)
    image = loaded.rgb
    ref = read_image(args.ref, options.background or "white").rgb if args.ref else None
    pipe, conditioner = load_model(args)
    if image.width % MULTIPLE or image.height % MULTIPLE:
        print(
            f"Padding {image.width}x{image.height} to multiples of {MULTIPLE}, cropped afterwards."
        )
    result = remove_object(
        pipe,
        conditioner,
        image,
        mask,
        steps=args.steps,
        seed=args.seed,
        guidance_scale=args.guidance_scale,
        ref=ref,
        redux_image=args.redux_image,
        diptych=args.diptych,
    )
    result = surround(
        pipe, result, image, mask, outside=args.outside, seam=args.seam, feather=args.feather
    )
    write_image(result, args.output, loaded, exif)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    main()
