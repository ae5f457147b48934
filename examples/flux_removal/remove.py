"""Remove an object from a picture with a trained checkpoint, through the stock Fill pipeline.

python remove.py --image photo.png --mask mask.png --checkpoint outputs/mine/checkpoint-1000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxFillPipeline
from PIL import Image, UnidentifiedImageError

from models import Conditioner, guidance_for, load_checkpoint, load_pipeline, to_pictures
from moe_lora.masks import composite
from options import BUNDLED_MODEL

MULTIPLE = 16
"""Flux packs 2x2 latents of 8x8 pixels into a token."""

FEATHER = 4
"""Pixels of soft edge around the mask, where the background is kept."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_picture(path: Path, mode: str) -> Image.Image:
    """Open an image file in a Pillow mode.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it cannot be read as an image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected an image file {path}, but there is none.")
    try:
        with Image.open(path) as picture:
            return picture.convert(mode)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"Expected {path} to be an image, but it cannot be read: {error}"
        ) from error


def check_mask(image: Image.Image, mask: Image.Image, *, threshold: bool = False) -> Image.Image:
    """Return a mask of 0 and 255 that fits the image.

    Args:
        image: the picture.
        mask: mode L; white = remove.
        threshold: cut grey values at 128 instead of refusing them.

    Raises:
        ValueError: when sizes differ, for a mask with grey values, or for an empty mask.
    """
    if mask.size != image.size:
        raise ValueError(
            f"Expected the mask to have the image's size, {image.width}x{image.height}, but got "
            f"{mask.width}x{mask.height}."
        )
    values = np.array(mask)
    grey = float(((values > 8) & (values < 247)).mean())
    if grey and not threshold:
        raise ValueError(
            f"Expected the mask to be black (keep) and white (remove), but {grey:.1%} of it is "
            "grey. Pass --threshold_mask to cut it at 128."
        )
    white = values >= 128
    if not white.any():
        raise ValueError("Expected white pixels in the mask, where to remove, but it has none.")
    return Image.fromarray(white.astype(np.uint8) * 255)


def pad_to_multiple(image: Image.Image, mask: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Pad both to the next multiple of 16 at the right and the bottom: edge colours, no mask."""
    bottom, right = -image.height % MULTIPLE, -image.width % MULTIPLE
    if not (bottom or right):
        return image, mask
    padded = np.pad(np.array(image), ((0, bottom), (0, right), (0, 0)), mode="edge")
    return Image.fromarray(padded), Image.fromarray(
        np.pad(np.array(mask), ((0, bottom), (0, right)))
    )


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
) -> Image.Image:
    """Return the picture with what the mask covers, and its shadow, removed.

    The picture is padded to multiples of 16 pixels, never resized, and the result is cropped to
    its size.

    Args:
        pipe: the stock pipeline; with a checkpoint loaded its transformer routes by itself.
        conditioner: makes the prompt embeddings.
        image: mode RGB.
        mask: mode L, 0 and 255, of the same size; white = remove.
        steps: of denoising.
        seed: of the noise.
        guidance_scale: for models with guidance embeddings; 30 when `None`.
        ref: the reference for Redux; the picture itself when `None`.
    """
    guidance = guidance_for(pipe.transformer, guidance_scale, 1)
    padded, padded_mask = pad_to_multiple(image, mask)
    pixels = torch.from_numpy(np.array(ref or image)).permute(2, 0, 1)[None] / 255
    prompt_embeds, pooled_embeds = conditioner(pixels)
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
    return result.crop((0, 0, image.width, image.height))


def keep_background(
    result: Image.Image, image: Image.Image, mask: Image.Image, feather: int
) -> Image.Image:
    """Paste the result into the picture, which stays as it was `feather + 1` pixels off the mask.

    Without it every pixel changes a little, since the VAE encodes and decodes all of them. With it
    a shadow outside the mask stays, too.

    Args:
        result: of `remove_object`.
        image: mode RGB, what it was made from.
        mask: mode L, 0 and 255; white = remove.
        feather: pixels around the mask in which the two are blended.
    """
    made, before, where = (
        torch.from_numpy(np.atleast_3d(np.array(picture))).permute(2, 0, 1)[None] / 255
        for picture in (result, image, mask)
    )
    return to_pictures(composite(made, before, where, feather))[0]


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True, help="the picture")
    parser.add_argument("--mask", type=Path, required=True, help="its size; white = remove")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a folder checkpoint-N")
    parser.add_argument("--output", type=Path, default=Path("removed.png"), help="the result")
    parser.add_argument("--flux_fill_id", default=str(BUNDLED_MODEL), help="the base model")
    parser.add_argument("--flux_redux_id", help="as in training")
    parser.add_argument("--ref", type=Path, help="reference for Redux; the picture by default")
    parser.add_argument("--prompt", help="as in training")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--guidance_scale", type=float, help="30 where the model reads one")
    parser.add_argument("--threshold_mask", action="store_true", help="cut grey masks at 128")
    parser.add_argument(
        "--keep_background",
        action="store_true",
        help="leave every pixel outside the mask as it was; shadows there stay, too",
    )
    parser.add_argument(
        "--feather",
        type=int,
        help=f"pixels of soft edge around the mask then; {FEATHER} if not set",
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="where to run")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16" if cuda else "fp32", help="of weights"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a program."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.ref is not None and args.flux_redux_id is None:
        parser.error("--ref needs --flux_redux_id, which is what reads it")
    if args.steps < 1:
        parser.error(f"expected --steps to be >= 1, but got {args.steps}")
    if args.feather is not None and not args.keep_background:
        parser.error("--feather needs --keep_background, whose edge it softens")
    feather = FEATHER if args.feather is None else args.feather
    if feather < 0:
        parser.error(f"expected --feather to be >= 0, but got {feather}")
    image = open_picture(args.image, "RGB")
    mask = check_mask(image, open_picture(args.mask, "L"), threshold=args.threshold_mask)
    ref = open_picture(args.ref, "RGB") if args.ref else None
    pipe = load_pipeline(args.flux_fill_id, dtype=DTYPES[args.dtype], device=args.device)
    load_checkpoint(pipe, args.checkpoint)
    conditioner = Conditioner(pipe, prompt=args.prompt, redux_id=args.flux_redux_id)
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
    )
    if args.keep_background:
        result = keep_background(result, image, mask, feather)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result.save(args.output)
    print(f"Wrote {args.output}.")


if __name__ == "__main__":
    main()
