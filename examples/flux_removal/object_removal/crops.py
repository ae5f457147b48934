"""Remove objects from images of any size: crop around the mask, and stitch at full resolution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import FluxFillPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flux_fill.models import Conditioner, to_pil_images
from flux_fill.surroundings import apply_surroundings
from moe_lora import masks
from object_removal.removing import remove_object, to_tensor
from removal_data.cropping import scale_image, scale_mask


@dataclass(frozen=True, kw_only=True)
class RemovalSettings:
    """How objects are removed.

    Attributes:
        steps: of denoising.
        guidance_scale: for models with guidance embeddings; 30 when `None`.
        redux_image: reference that is made of the image, see `removal_data.references`.
        diptych: whether the reference lies left of the image during inference.
        outside: one of `flux_fill.surroundings.OUTSIDE`.
        seam: strength of the seam correction, in [0, 1].
        feather: pixels around the mask, at the size of the model, in which `paste` blends.
        resolution: crops have about `resolution²` pixels; the size of the VAE when `None`.
        crop_context: surroundings of the mask in a crop, relative to the longer side of its box.
    """

    steps: int = 20
    guidance_scale: float | None = None
    redux_image: str = "masked_source"
    diptych: bool = False
    outside: str = "keep"
    seam: float = 0.5
    feather: int = 0
    resolution: int | None = None
    crop_context: float = 1.0


def remove_from_photograph(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    image: Image.Image,
    mask: NDArray[np.bool_],
    settings: RemovalSettings,
    *,
    seed: int = 0,
    ref: Image.Image | None = None,
) -> Image.Image:
    """Return an image of any size with what the mask covers, and its shadow, removed.

    Every crop of `moe_lora.masks.crop_boxes` is edited and put back before the next one is cut. The
    model fills all of the mask in a crop but for parts that have had a crop of their own.

    Args:
        pipe: the stock pipeline.
        conditioner: makes the prompt embeddings.
        image: mode RGB.
        mask: `(H, W)`; True = remove.
        settings: see there.
        seed: of the noise, the same for every crop.
        ref: the reference; of the size of the image, it is cropped as the image is.
    """
    resolution = settings.resolution or int(pipe.vae.config.sample_size)
    where = torch.from_numpy(mask)[None, None].float()
    boxes = masks.crop_boxes(where, resolution, context=settings.crop_context)[0]
    del where
    result, waiting = image.copy(), mask.copy()
    for box in boxes:
        window = (box.left, box.top, box.left + box.width, box.top + box.height)
        part = ref.crop(window) if ref is not None and ref.size == image.size else ref
        inside = waiting[window[1] : window[3], window[0] : window[2]]
        edited = edit_crop(
            pipe, conditioner, result.crop(window), inside, settings, box.size, seed=seed, ref=part
        )
        result.paste(edited, window[:2])
        for top, left, bottom, right in box.parts:
            waiting[top:bottom, left:right] = False
    return result


@torch.no_grad()
def edit_crop(
    pipe: FluxFillPipeline,
    conditioner: Conditioner,
    image: Image.Image,
    mask: NDArray[np.bool_],
    settings: RemovalSettings,
    size: tuple[int, int],
    *,
    seed: int,
    ref: Image.Image | None = None,
) -> Image.Image:
    """Edit a crop at the size of the model, and return it at its own.

    Args:
        pipe: the stock pipeline.
        conditioner: makes the prompt embeddings.
        image: the crop, mode RGB.
        mask: `(H, W)`; True = remove.
        settings: see there.
        size: rows and columns at which the model runs.
        seed: of the noise.
        ref: the reference.
    """
    bucket, window = (size[1], size[0]), (0.0, 0.0, float(image.width), float(image.height))
    small = image if image.size == bucket else scale_image(image, bucket, window)
    small_mask = mask if image.size == bucket else scale_mask(mask, bucket, window)
    shown = Image.fromarray(small_mask.astype(np.uint8) * 255)
    prediction = remove_object(
        pipe,
        conditioner,
        small,
        shown,
        steps=settings.steps,
        seed=seed,
        guidance_scale=settings.guidance_scale,
        ref=ref,
        redux_image=settings.redux_image,
        diptych=settings.diptych,
    )
    whole = image.size == bucket
    found, reduced, where = (to_tensor(part)[None] for part in (prediction, small, shown))
    edited = apply_surroundings(
        pipe.vae,
        found,
        reduced,
        where,
        outside=settings.outside,
        seam=settings.seam if whole else 0.0,
        feather=settings.feather,
    )
    if whole:
        return to_pil_images(edited)[0]
    return stitch_channels(image, edited, reduced, mask, found, strength=settings.seam)


def stitch_channels(
    image: Image.Image,
    edited: Tensor,
    reduced: Tensor,
    mask: NDArray[np.bool_],
    prediction: Tensor,
    *,
    strength: float,
) -> Image.Image:
    """Stitch an edit into its crop, one channel after another, which needs a third of the memory.

    Args:
        image: the crop, mode RGB.
        edited: `(1, 3, h, w)`, in [0, 1], what became of `reduced`.
        reduced: `(1, 3, h, w)`, in [0, 1], the crop at the size of the model.
        mask: `(H, W)` of the crop; True = remove.
        prediction: `(1, 3, h, w)`, in [0, 1], the image that `edited` was made of.
        strength: of the seam correction, in [0, 1].
    """
    height, width = mask.shape
    box = masks.CropBox(0, 0, height, width, (edited.shape[2], edited.shape[3]))
    where = torch.from_numpy(mask)[None, None].float()
    channels = []
    for index, channel in enumerate(image.split()):
        one = slice(index, index + 1)
        source = torch.from_numpy(np.array(channel))[None, None] / 255
        stitched = masks.stitch(
            source,
            edited[:, one],
            reduced[:, one],
            where,
            box,
            prediction=prediction[:, one],
            strength=strength,
        )
        channels.append(Image.fromarray(stitched[0, 0].mul(255).round().byte().numpy()))
    return Image.merge("RGB", channels)
