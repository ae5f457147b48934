"""Decide what becomes of the image outside the mask, and of the seam along its edge."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from image_io.padding import MULTIPLE
from moe_lora.masks import composite, correct_seam, keep_source

OUTSIDE = {
    "keep": "the source and what the model changed on purpose, such as a shadow that went",
    "paste": "the source; shadows there stay",
    "prediction": "the model's image, in which a VAE changed every pixel",
}
"""Choices of `--outside`, and what is outside the mask then."""

SEAM = 0.5
"""Strength of the seam correction of `keep`."""

FEATHER = 4
"""Pixels of soft edge around the mask of `paste`."""


def add_surroundings_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--outside`, `--seam` and `--feather` to a parser."""
    choices = "; ".join(f"{name}: {meaning}" for name, meaning in OUTSIDE.items())
    parser.add_argument(
        "--outside", choices=OUTSIDE, default="keep", help=f"outside the mask, {choices}"
    )
    parser.add_argument(
        "--seam",
        type=float,
        help="share of the step along the mask's edge that is taken out of the fill, from 0 to 1; "
        f"if not set, {SEAM} with --outside keep, and 0 with paste",
    )
    parser.add_argument(
        "--feather",
        type=int,
        help=f"pixels of soft edge around the mask with --outside paste; if not set, {FEATHER}, "
        "and 0 with --seam",
    )


def check_surroundings(args: argparse.Namespace) -> None:
    """Check the flags of `add_surroundings_flags`, and put in what was not set.

    Raises:
        ValueError: for a flag that cannot be honored.
    """
    if args.feather is not None and args.outside != "paste":
        raise ValueError("--feather needs --outside paste, whose edge it softens")
    if args.seam is not None and args.outside == "prediction":
        raise ValueError("--seam needs --outside keep or paste, whose seam it takes out")
    if args.seam is None:
        args.seam = SEAM if args.outside == "keep" else 0.0
    if args.feather is None:
        args.feather = FEATHER if args.outside == "paste" and args.seam == 0 else 0
    if args.feather < 0:
        raise ValueError(f"expected --feather to be >= 0, but got {args.feather}")
    if not 0 <= args.seam <= 1:
        raise ValueError(f"expected --seam to be in [0, 1], but got {args.seam}")
    if args.feather and args.seam:
        raise ValueError("--seam and --feather both soften the edge; pass one of them")


@torch.no_grad()
def apply_surroundings(
    vae: AutoencoderKL,
    prediction: Tensor,
    source: Tensor,
    mask: Tensor,
    *,
    outside: str = "keep",
    seam: float = SEAM,
    feather: int = 0,
) -> Tensor:
    """Combine a prediction with the source outside the mask.

    Args:
        vae: of the pipeline that made the prediction; `keep` asks what it alone changes.
        prediction: `(B, 3, H, W)`, in [0, 1], of any size.
        source: the same shape and range, the image with the object.
        mask: `(B, 1, H, W)`, zeros and ones; 1 = remove.
        outside: one of `OUTSIDE`.
        seam: strength of the seam correction, in [0, 1]; not read for `prediction`.
        feather: pixels of soft edge, for `paste`.

    Returns:
        `(B, 3, H, W)`, in [0, 1].
    """
    if outside == "prediction":
        return prediction
    if outside == "paste":
        image = composite(prediction, source, mask, feather)
    else:
        image = keep_source(prediction, source, mask, lambda pasted: reconstruct(vae, pasted))
    return correct_seam(image, prediction, mask, strength=seam)


def reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encode and decode images `(B, 3, H, W)` in [0, 1] of any size, without noise."""
    height, width = images.shape[2:]
    padding = (0, -width % MULTIPLE, 0, -height % MULTIPLE)
    padded = F.pad(2 * images - 1, padding, mode="replicate").to(vae.device, vae.dtype)
    decoded = vae.decode(vae.encode(padded).latent_dist.mode()).sample
    return (decoded[..., :height, :width].to(images) / 2 + 0.5).clamp(0, 1)
