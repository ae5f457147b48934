"""Images with masks, from two folders whose files have the same names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset


class MaskedImages(Dataset[dict[str, Tensor]]):
    """Read `images/NAME` and `masks/NAME`; what is white in a mask shall be filled.

    Args:
        folder: holds `images` and `masks`.
        resolution: of the square that both are cropped and scaled to, in pixels.

    Raises:
        FileNotFoundError: when there are no images, or one has no mask.
    """

    def __init__(self, folder: str, resolution: int) -> None:
        self.size = (resolution, resolution)
        self.images = sorted(path for path in Path(folder, "images").glob("*") if path.is_file())
        if not self.images:
            raise FileNotFoundError(f"Expected images in {Path(folder, 'images')}, but got none.")
        self.masks = [Path(folder, "masks", path.name) for path in self.images]
        for mask in self.masks:
            if not mask.is_file():
                raise FileNotFoundError(f"Expected a mask {mask}, but there is none.")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `image (3, H, W)`, in [-1, 1], and `mask (1, H, W)`, 0 or 1."""
        image = ImageOps.fit(Image.open(self.images[index]).convert("RGB"), self.size)
        mask = ImageOps.fit(Image.open(self.masks[index]).convert("L"), self.size)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        covered = torch.from_numpy(np.array(mask))[None]
        return {"image": pixels / 127.5 - 1, "mask": (covered > 127).float()}
