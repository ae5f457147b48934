"""Read removal triplets from a folder of images."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from image_io.image_files import read_size
from image_io.mask_reading import read_mask
from image_io.reading import read_image
from removal_data.buckets import assign_buckets
from removal_data.cropping import crop_window, mask_box, scale_image, scale_mask
from removal_data.options import DataOptions
from removal_data.references import REFERENCES
from removal_data.sources.layouts import find_samples
from removal_data.sources.samples import Sample, raise_first


class RemovalDataset(Dataset[dict[str, Tensor]]):
    """Read removal triplets from a folder, a manifest or a Hugging Face data set.

    Files are of any kind that `image_io` reads; images are turned upright and converted to sRGB.
    Without a `ref` the masked source is the reference. All images of a sample have the same
    size, and its sides are multiples of 16; with `reading.resolution`, the size of a bucket.

    Args:
        folder: what `find_samples` takes.
        size: `(height, width)` in pixels, or one number for a square, that every sample must have;
            None accepts any.
        reading: how images and masks are read, scaled and cropped.
        skip: the names of samples to leave out.
        batch_size: samples that buckets have at least, see `assign_buckets`.

    Raises:
        FileNotFoundError: a folder, or a file of a sample, is missing.
        ValueError: two files claim to be the same one, or `size` is not made of multiples of 16.
            Reading a sample raises it for a file that is unreadable or of the wrong size.

    An item is a dict of float tensors in [0, 1]: `src`, `result`, `ref` `(3, H, W)` and
    `mask` `(1, H, W)`, 0 and 1 only, 1 = remove. Where samples have captions, `caption` is the
    index in `captions`, -1 for none; `kind` and `kinds` likewise. With `reading.diptych`, all but
    `ref` are `(..., H, 2 W)`.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int | tuple[int, int] | None = None,
        *,
        reading: DataOptions | None = None,
        skip: Collection[str] = (),
        batch_size: int = 1,
    ) -> None:
        self.reading = reading or DataOptions()
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and any(side < 16 or side % 16 for side in self.size):
            raise ValueError(f"Expected `size` to be made of multiples of 16, but got {size}.")
        samples, findings = find_samples(folder)
        raise_first([finding for finding in findings if finding.sample not in skip])
        self.samples = [sample for sample in samples if sample.name not in skip]
        self.captions = list(
            dict.fromkeys(s.caption for s in self.samples if s.caption is not None)
        )
        self.caption_indices: dict[str | None, int] = {None: -1}
        self.caption_indices |= {caption: i for i, caption in enumerate(self.captions)}
        self.kinds = list(dict.fromkeys(s.kind for s in self.samples if s.kind is not None))
        self.buckets: list[tuple[int, int]] | None = None
        if self.reading.resolution is not None:
            sizes = [source_size(sample) for sample in self.samples]
            self.buckets = assign_buckets(sizes, self.reading, batch_size=batch_size)

    @property
    def stems(self) -> list[str]:
        """Return the names of the samples, in their order."""
        return [sample.name for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        images, mask = self._read(sample)
        self._check_sizes(sample, images)
        if self.buckets is not None:
            images, mask = self._fit(images, mask, self.buckets[index])
        item = {part: to_tensor(image) for part, image in images.items()}
        item["mask"] = torch.from_numpy(mask).float()[None]
        ref, how = item.get("ref"), self.reading.redux_image
        if ref is None or how != "ref":
            how = "masked_source" if how == "ref" else how
            item["ref"] = REFERENCES[how](item["src"], item["mask"])
        if self.reading.diptych:
            item |= self._diptych(sample, item, ref)
        if self.captions:
            item["caption"] = torch.tensor(self.caption_indices[sample.caption])
        return item | self.kind_at(index)

    def kind_at(self, index: int) -> dict[str, Tensor]:
        """Return the part `kind` of an item; nothing where no sample has one."""
        kind = self.samples[index].kind
        if not self.kinds:
            return {}
        return {"kind": torch.tensor(-1 if kind is None else self.kinds.index(kind))}

    def _read(self, sample: Sample) -> tuple[dict[str, Image.Image], NDArray[np.bool_]]:
        """Read the images of a sample, and its mask by the size of the source."""
        images: dict[str, Image.Image] = {}
        for part, path in sample.files.items():
            try:
                if part == "mask":
                    src = sample.files["src"]
                    mask = read_mask(path, read_size(src), self.reading, image=src)
                else:
                    images[part] = read_image(path, self.reading.background or "white").rgb
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(
                    f"Cannot use `{part}` of sample {sample.name!r}: {error}"
                ) from error
        return images, mask

    def _check_sizes(self, sample: Sample, images: dict[str, Image.Image]) -> None:
        """Raise for images of other sizes than the source's, and for sides that are not usable."""
        width, height = self.size[::-1] if self.size else images["src"].size
        for part, image in images.items():
            free = part == "ref" and self.buckets is not None
            if image.size != (width, height) and not free:
                whose = "of `size`" if self.size else f"of {sample.files['src']}"
                raise ValueError(
                    f"Expected `{part}` of sample {sample.name!r} to be {height}x{width} (height x "
                    f"width {whose}), but {sample.files[part]} is {image.height}x{image.width}."
                )
        if self.buckets is None and (height % 16 or width % 16):
            raise ValueError(
                f"Expected the sides of sample {sample.name!r} to be multiples of 16, but "
                f"{sample.files['src']} is {height}x{width} (height x width). Pass --resolution "
                "to scale and crop."
            )

    def _diptych(
        self, sample: Sample, item: dict[str, Tensor], ref: Tensor | None
    ) -> dict[str, Tensor]:
        """Lay the reference left of source and target, with nothing to remove in it."""
        if ref is None:
            raise ValueError(f"Expected a `ref` of sample {sample.name!r} with --diptych.")
        left = {"src": ref, "result": ref, "mask": torch.zeros_like(item["mask"])}
        return {part: torch.cat([image, item[part]], dim=-1) for part, image in left.items()}

    def subset(self, indices: Sequence[int]) -> RemovalDataset:
        """Return some of the samples, with the sizes and captions of the whole data set."""
        copied = copy.copy(self)
        copied.samples = [self.samples[index] for index in indices]
        if self.buckets is not None:
            copied.buckets = [self.buckets[index] for index in indices]
        return copied

    def with_captions(self, captions: Sequence[str]) -> RemovalDataset:
        """Return the same samples, whose captions are indices in a longer list.

        Args:
            captions: with all of those of the data set.
        """
        copied = copy.copy(self)
        copied.captions = list(captions)
        copied.caption_indices = {None: -1, **{text: i for i, text in enumerate(captions)}}
        return copied

    def singles(self) -> RemovalDataset:
        """Return the same samples without references beside them."""
        copied = copy.copy(self)
        copied.reading = dataclasses.replace(self.reading, diptych=False)
        return copied

    def _fit(
        self, images: dict[str, Image.Image], mask: NDArray[np.bool_], bucket: tuple[int, int]
    ) -> tuple[dict[str, Image.Image], NDArray[np.bool_]]:
        """Scale and crop a sample to its bucket; a reference of another size by its middle."""
        size, context = images["src"].size, self.reading.crop_context
        window = crop_window(size, bucket, mask_box(mask), context=context)
        fitted = {
            part: scale_image(
                image,
                bucket,
                window if image.size == size else crop_window(image.size, bucket, None),
            )
            for part, image in images.items()
        }
        return fitted, scale_mask(mask, bucket, window)


def source_size(sample: Sample) -> tuple[int, int]:
    """Return the width and height of an upright sample, read from the header of its source.

    Raises:
        ValueError: when it cannot be read.
    """
    try:
        return read_size(sample.files["src"])
    except (ValueError, OSError) as error:
        raise ValueError(f"Cannot use `src` of sample {sample.name!r}: {error}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """Turn an image into `(3, H, W)`, in [0, 1]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.contiguous().float() / 255
