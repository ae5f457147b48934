"""What a page has at hand: a tiny random pipeline in the place of FLUX.1 Fill, batches, images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

HUB_ID = "black-forest-labs/FLUX.1-Fill-dev"


def training_batches(
    count: int = 1, dtype: torch.dtype = torch.bfloat16, size: tuple[int, int] = (32, 48)
) -> list[dict[str, Any]]:
    """Return what a FLUX Fill loop has at hand, at random: two samples of 32x48 pixels."""
    (height, width), batches = size, []
    rows, columns = height // 16, width // 16
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    for _ in range(count):
        mask = torch.zeros(2, 1, height, width)
        mask[0, :, 4:20, 8:40] = 1
        mask[1, :, 8:12, 8:12] = 1
        cells = mask.view(2, rows, 2, 8, columns, 2, 8).permute(0, 1, 4, 3, 6, 2, 5)
        batch: dict[str, Any] = {
            "latents": torch.randn(2, rows * columns, 64, dtype=dtype),
            "masked_latents": torch.randn(2, rows * columns, 64, dtype=dtype),
            "packed_mask": cells.reshape(2, rows * columns, 256).to(dtype),
            "mask": mask,
            "src": torch.rand(2, 3, height, width),
            "result": torch.rand(2, 3, height, width),
            "conditioning": {
                "encoder_hidden_states": torch.randn(2, 3, 16, dtype=dtype),
                "pooled_projections": torch.randn(2, 16, dtype=dtype),
                "img_ids": ids.view(-1, 3),
                "txt_ids": torch.zeros(3, 3),
            },
        }
        batches.append(batch)
    return batches


def write_images(folder: Path) -> None:
    """Write a user's files: photo.png and mask.png, photo.jpg, and erased.png with a hole."""
    mask = Image.new("L", (48, 32), 0)
    mask.paste(255, (8, 8, 24, 24))
    photo = Image.linear_gradient("L").resize(mask.size).convert("RGB")
    mask.save(folder / "mask.png")
    photo.save(folder / "photo.png")
    photo.resize((70, 50)).save(folder / "photo.jpg")
    erased = photo.convert("RGBA")
    erased.putalpha(mask.point(lambda value: 255 - value))
    erased.save(folder / "erased.png")
