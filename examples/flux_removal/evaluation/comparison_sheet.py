"""Draw samples and what models predict for them side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from evaluation.measuring import regions
from removal_data.dataset import RemovalDataset
from reporting.contact_sheet import contact_sheet, show_mask


def draw_comparison(
    dataset: RemovalDataset, predictions: dict[str, list[Tensor]], path: Path, *, rows: int = 8
) -> None:
    """Write a contact sheet from small masks to large ones.

    Every group of samples with masks of similar size is shown by the sample with the largest
    shadow.

    Args:
        dataset: the triplets.
        predictions: `(3, H, W)` in [0, 1] for every sample, by the title of their column.
        path: of the PNG file.
        rows: groups of samples.
    """
    items = [dataset[index] for index in range(len(dataset))]
    areas = [float(item["mask"].mean()) for item in items]
    shadows = [int(regions(item)["shadow"].sum()) for item in items]
    order = sorted(range(len(items)), key=areas.__getitem__)
    groups = np.array_split(order, min(rows, len(order)))
    shown = [max(group.tolist(), key=shadows.__getitem__) for group in groups]
    lines = [
        {"source": items[i]["src"], "mask": show_mask(items[i]["src"], items[i]["mask"])}
        | {title: images[i] for title, images in predictions.items()}
        | {"target": items[i]["result"]}
        for i in shown
    ]
    contact_sheet(lines, path)
