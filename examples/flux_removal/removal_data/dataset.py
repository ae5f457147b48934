"""Read removal triplets from a folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from image_io.image_files import IMAGE_SUFFIXES, read_size
from image_io.mask_reading import MASK_SUFFIXES, read_mask
from image_io.options import ReadingOptions
from image_io.reading import read_image


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
    ) -> None:
        self.folder = Path(folder)
        self.reading = reading or ReadingOptions()
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and any(side < 16 or side % 16 for side in self.size):
            raise ValueError(f"Expected `size` to be made of multiples of 16, but got {size}.")
        self.parts: tuple[str, ...] = ("src", "mask", "result")
        if (self.folder / "ref").is_dir():
            self.parts += ("ref",)
        self.files = {part: self._list(part) for part in self.parts}
        self.stems = sorted({stem for found in self.files.values() for stem in found})
        if not self.stems:
            raise FileNotFoundError(
                f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {self.folder / 'src'}, but got "
                "none."
            )
        for stem in self.stems:
            for part in self.parts:
                if stem not in self.files[part]:
                    other = next(p for p in self.parts if stem in self.files[p])
                    raise FileNotFoundError(
                        f"Sample {stem!r} has no `{part}`: expected {self.folder / part / stem}.* "
                        f"({', '.join(self._suffixes(part))}) beside {self.files[other][stem]}."
                    )

    @staticmethod
    def _suffixes(part: str) -> tuple[str, ...]:
        return MASK_SUFFIXES if part == "mask" else IMAGE_SUFFIXES

    def _list(self, part: str) -> dict[str, Path]:
        directory = self.folder / part
        if not directory.is_dir():
            raise FileNotFoundError(f"Expected a folder {directory}, but there is none.")
        found: dict[str, Path] = {}
        for path in sorted(directory.iterdir()):
            if path.suffix.lower() not in self._suffixes(part) or path.name.startswith("."):
                continue
            if path.stem in found:
                raise ValueError(
                    f"Sample {path.stem!r} has two files for `{part}`: "
                    f"{found[path.stem]} and {path}."
                )
            found[path.stem] = path
        return found

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        stem = self.stems[index]
        item = self._read(stem)
        height, width = self.size or item["src"].shape[-2:]
        for part in self.parts:
            got = tuple(item[part].shape[-2:])
            if got != (height, width):
                whose = "of `size`" if self.size else f"of {self.files['src'][stem]}"
                raise ValueError(
                    f"Expected `{part}` of sample {stem!r} to be {height}x{width} (height x width "
                    f"{whose}), but {self.files[part][stem]} is {got[0]}x{got[1]}."
                )
        if height % 16 or width % 16:
            raise ValueError(
                f"Expected the sides of sample {stem!r} to be multiples of 16, but "
                f"{self.files['src'][stem]} is {height}x{width} (height x width)."
            )
        item.setdefault("ref", item["src"].clone())
        return item

    def _read(self, stem: str) -> dict[str, Tensor]:
        """Read the files of a sample, the mask by the size of the source."""
        item: dict[str, Tensor] = {}
        for part in self.parts:
            path = self.files[part][stem]
            try:
                if part == "mask":
                    src = self.files["src"][stem]
                    mask = read_mask(path, read_size(src), self.reading, image=src)
                    item[part] = torch.from_numpy(mask).float()[None]
                else:
                    rgb = read_image(path, self.reading.background or "white").rgb
                    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
                    item[part] = pixels.contiguous().float() / 255
            except (ValueError, FileNotFoundError) as error:
                raise ValueError(f"Cannot use `{part}` of sample {stem!r}: {error}") from error
        return item
