"""Draw what a run did: a contact sheet, and the routing weights."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models import to_pictures

matplotlib.use("Agg")

from matplotlib import pyplot as plt

COLOURS = {"removal": "#c44e52", "background": "#4c72b0", "completion": "#55a868"}
MARGIN, HEADER = 6, 26
MASK_COLOUR = torch.tensor([1.0, 0.1, 0.3]).view(3, 1, 1)


def show_mask(src: Tensor, mask: Tensor) -> Tensor:
    """Lay a mask `(1, H, W)` over a picture `(3, H, W)` as a red tint."""
    return src * (1 - 0.6 * mask) + 0.6 * mask * MASK_COLOUR


def contact_sheet(rows: list[dict[str, Tensor]], path: Path, *, scale: int = 2) -> None:
    """Write a table of pictures with the keys of a row as its header.

    Args:
        rows: images `(3, H, W)` in [0, 1], all of one size, with the same keys in every row.
        path: of the PNG file.
        scale: how often a pixel is enlarged.
    """
    names = list(rows[0])
    height, width = (scale * side for side in next(iter(rows[0].values())).shape[-2:])
    sheet = Image.new(
        "RGB",
        (
            len(names) * (width + MARGIN) + MARGIN,
            HEADER + len(rows) * (height + MARGIN) + MARGIN,
        ),
        "white",
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=16)
    for column, name in enumerate(names):
        left = MARGIN + column * (width + MARGIN)
        pen.text((left + width / 2, HEADER / 2), name, fill="black", font=font, anchor="mm")
        for index, row in enumerate(rows):
            picture = to_pictures(row[name][None])[0].resize((width, height), Image.BICUBIC)
            sheet.paste(picture, (left, HEADER + MARGIN + index * (height + MARGIN)))
    sheet.save(path)


def short(name: str) -> str:
    """Return an expert's name without `_expert`."""
    return name.removesuffix("_expert")


def plot_routing_over_training(metrics: Path, path: Path) -> None:
    """Draw the mean routing weights, and their entropy, of a run's `metrics.jsonl`."""
    entries = [json.loads(line) for line in metrics.read_text().splitlines()]
    entries = [entry for entry in entries if "routing/entropy" in entry]
    names = [
        key.removeprefix("routing/")
        for key in entries[0]
        if key.startswith("routing/") and key != "routing/entropy" and not key.endswith("_usage")
    ]
    steps = [entry["step"] for entry in entries]
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in names:
        values = [entry[f"routing/{name}"] for entry in entries]
        axes.plot(steps, values, label=short(name), color=COLOURS.get(short(name)), linewidth=2)
    entropy = [entry["routing/entropy"] for entry in entries]
    axes.plot(steps, entropy, "k:", label="entropy of a sample's weights / log E")
    routed = next((e["step"] for e in entries if "routing/expert_0_usage" in e), None)
    if routed is not None:
        axes.axvline(routed, color="grey", linewidth=1)
        axes.text(routed, 1.02, " routed", va="bottom", ha="left", color="grey")
    axes.set(xlabel="step", ylabel="mean routing weight", ylim=(0, 1.01))
    axes.legend(loc="center left", fontsize=8, bbox_to_anchor=(0, 0.7))
    _save(figure, path)


def plot_routing_by_mask_size(
    areas: list[float], weights: list[Tensor], names: list[str], path: Path
) -> None:
    """Draw the routing weights of samples over the area of their masks.

    Args:
        areas: masked share of the picture, one per sample.
        weights: `(E,)`, one per sample.
        names: the experts.
        path: of the PNG file.
    """
    order = np.argsort(areas)
    x, y = np.array(areas)[order], torch.stack(weights).numpy()[order]
    groups = np.array_split(np.arange(len(x)), max(1, min(6, len(x) // 4)))
    figure, axes = plt.subplots(figsize=(7, 4))
    for index, name in enumerate(names):
        colour = COLOURS.get(short(name))
        axes.scatter(100 * x, y[:, index], s=14, alpha=0.5, color=colour)
        axes.plot(
            [100 * x[group].mean() for group in groups],
            [y[group, index].mean() for group in groups],
            color=colour,
            label=short(name),
            linewidth=2,
        )
    axes.set(xlabel="masked share of the picture, %", ylabel="routing weight", ylim=(0, 1.01))
    axes.legend(loc="upper right", fontsize=8)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
