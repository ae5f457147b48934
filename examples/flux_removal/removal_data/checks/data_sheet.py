"""Draw samples for inspection."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from image_io.options import ReadingOptions
from removal_data.checks.alignment import Array
from removal_data.checks.contents import read_content
from removal_data.checks.report import Report
from reporting.contact_sheet import contact_sheet, show_mask

SIDE = 192


def to_tensor(image: Array) -> Tensor:
    """Turn an image `(H, W, 3)` or a map `(H, W)` into `(C, H, W)`."""
    return torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1).float()


def draw_samples(report: Report, reading: ReadingOptions, path: Path, *, rows: int) -> int:
    """Write a contact sheet: source, mask, target and their difference, four times enlarged.

    Args:
        report: samples with warnings come first, then others in equal distances.
        reading: how images and masks are read.
        path: of the PNG file.
        rows: the most samples to draw.

    Returns:
        How many were drawn.
    """
    warned = {finding.sample for finding in report.findings}
    first = [sample for sample in report.usable if sample.name in warned][:rows]
    others = [sample for sample in report.usable if sample.name not in warned]
    places = np.linspace(0, len(others) - 1, min(rows - len(first), len(others))).round()
    lines, labels = [], []
    for sample in first + [others[int(place)] for place in places]:
        content, _ = read_content(sample, reading, side=SIDE)
        if content is None:
            continue
        src, result = to_tensor(content.src), to_tensor(content.result)
        mask = to_tensor(content.mask)
        lines.append(
            {
                "source": src,
                "mask": show_mask(src, mask),
                "target": result,
                "difference x 4": (4 * (src - result).abs()).clamp(max=1),
            }
        )
        labels.append(("! " if sample.name in warned else "") + sample.name[-24:])
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(lines, path, scale=1, labels=labels)
    return len(lines)
