"""Remove an object from an image of a size that the model works at."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import FluxFillPipeline
from PIL import Image

from flux_fill.models import Conditioner, guidance_for
from image_io.padding import pad_to_multiple
from removal_data.references import REFERENCES


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
