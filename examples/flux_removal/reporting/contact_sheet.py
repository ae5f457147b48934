"""Draw what a run did: a contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from flux_fill.models import to_pil_images

MARGIN, HEADER = 6, 26
MASK_COLOR = torch.tensor([1.0, 0.1, 0.3]).view(3, 1, 1)


def show_mask(src: Tensor, mask: Tensor) -> Tensor:
    """Lay a mask `(1, H, W)` over an image `(3, H, W)` as a red tint."""
    return src * (1 - 0.6 * mask) + 0.6 * mask * MASK_COLOR


def contact_sheet(
    rows: list[dict[str, Tensor]], path: Path, *, scale: int = 2, labels: Sequence[str] = ()
) -> None:
    """Write a table of images with the keys of a row as its header.

    Args:
        rows: images `(3, H, W)` in [0, 1], with the same keys in every row; all are scaled to fit
            into the size of the first one.
        path: of the PNG file.
        scale: how often a pixel is enlarged.
        labels: what stands left of the rows, one for each; nothing by default.

    Raises:
        ValueError: when there are not as many labels as rows.
    """
    if labels and len(labels) != len(rows):
        raise ValueError(
            f"Expected `labels` for all of the {len(rows)} rows, but got {len(labels)}."
        )
    names, font = list(rows[0]), ImageFont.load_default(size=16)
    height, width = (scale * side for side in next(iter(rows[0].values())).shape[-2:])
    indent = round(max((font.getlength(label) for label in labels), default=-MARGIN)) + MARGIN
    sheet = Image.new(
        "RGB",
        (
            indent + len(names) * (width + MARGIN) + MARGIN,
            HEADER + len(rows) * (height + MARGIN) + MARGIN,
        ),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    for index, label in enumerate(labels):
        middle = HEADER + MARGIN + index * (height + MARGIN) + height / 2
        pen.text((MARGIN, middle), label, fill="black", font=font, anchor="lm")
    for column, name in enumerate(names):
        left = indent + MARGIN + column * (width + MARGIN)
        pen.text((left + width / 2, HEADER / 2), name, fill="black", font=font, anchor="mm")
        for index, row in enumerate(rows):
            cell = ImageOps.pad(to_pil_images(row[name][None])[0], (width, height), color="white")
            sheet.paste(cell, (left, HEADER + MARGIN + index * (height + MARGIN)))
    sheet.save(path)
