"""Read removal triplets from a folder of images."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from image_io.image_files import read_size
from image_io.mask_reading import read_mask
from image_io.options import ReadingOptions
from image_io.reading import read_image
from removal_data.layouts import find_samples
from removal_data.samples import Sample, raise_first


class RemovalDataset(Dataset[dict[str, Tensor]]):
    """Read the layout `folder/{src,mask,result,ref}/STEM.SUFFIX`.

    Files are of any kind that `image_io` reads; images are turned upright and converted to sRGB.
    The four files of a sample share their stem; their suffixes may differ. Without a folder `ref`
    the source stands in for the reference. All images of a sample have the same size, and its
    sides are multiples of 16.

    Args:
        folder: holds the folders `src`, `mask`, `result` and, if wanted, `ref`.
        size: `(height, width)` in pixels, or one number for a square, that every sample must have;
            None accepts any.
        reading: how images and masks are read.
        skip: the names of samples to leave out.

    Raises:
        FileNotFoundError: a folder, or a file of a sample, is missing.
        ValueError: two files claim to be the same one, or `size` is not made of multiples of 16.
            Reading a sample raises it for a file that is unreadable or of the wrong size.

    An item is a dict of float tensors in [0, 1]: `src`, `result`, `ref` `(3, H, W)` and
    `mask` `(1, H, W)`, 0 and 1 only, 1 = remove.
    """

    def __init__(
        self,
        folder: str | Path,
        size: int | tuple[int, int] | None = None,
        *,
        reading: ReadingOptions | None = None,
        skip: Collection[str] = (),
    ) -> None:
        self.folder = Path(folder)
        self.reading = reading or ReadingOptions()
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and any(side < 16 or side % 16 for side in self.size):
            raise ValueError(f"Expected `size` to be made of multiples of 16, but got {size}.")
        samples, findings = find_samples(self.folder)
        raise_first([finding for finding in findings if finding.sample not in skip])
        self.samples = [sample for sample in samples if sample.name not in skip]

    @property
    def stems(self) -> list[str]:
        """Return the names of the samples, in their order."""
        return [sample.name for sample in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        item = self._read(sample)
        height, width = self.size or item["src"].shape[-2:]
        for part, path in sample.files.items():
            got = tuple(item[part].shape[-2:])
            if got != (height, width):
                whose = "of `size`" if self.size else f"of {sample.files['src']}"
                raise ValueError(
                    f"Expected `{part}` of sample {sample.name!r} to be {height}x{width} (height x "
                    f"width {whose}), but {path} is {got[0]}x{got[1]}."
                )
        if height % 16 or width % 16:
            raise ValueError(
                f"Expected the sides of sample {sample.name!r} to be multiples of 16, but "
                f"{sample.files['src']} is {height}x{width} (height x width)."
            )
        item.setdefault("ref", item["src"].clone())
        return item

    def _read(self, sample: Sample) -> dict[str, Tensor]:
        """Read the files of a sample, the mask by the size of the source."""
        item: dict[str, Tensor] = {}
        for part, path in sample.files.items():
            try:
                if part == "mask":
                    src = sample.files["src"]
                    mask = read_mask(path, read_size(src), self.reading, image=src)
                    item[part] = torch.from_numpy(mask).float()[None]
                else:
                    rgb = read_image(path, self.reading.background or "white").rgb
                    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
                    item[part] = pixels.contiguous().float() / 255
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(
                    f"Cannot use `{part}` of sample {sample.name!r}: {error}"
                ) from error
        return item
