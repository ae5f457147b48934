"""Figures of how a run routed, in trackers and as files."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_lora import masks, plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from reporting.trackers import FigureWriter

PIXELS_PER_TOKEN = 16
"""Of Flux, in height and in width."""

LATEST = 1000
"""Samples that are drawn: the router changes, and its early choices would blur the late ones."""


@dataclass(frozen=True)
class TokenSample:
    """Hold one sample that was routed token by token.

    Attributes:
        weights: `(rows, columns, E)`, routing weights.
        image: `(3, H, W)`, in [0, 1].
        mask: `(1, H, W)`, in [0, 1]; 1 = remove.
    """

    weights: Tensor
    image: Tensor
    mask: Tensor


class RoutingFigures:
    """Draw how samples were routed.

    A figure takes a few tenths of a second. So one batch is noted at every log entry, and what has
    come together is drawn at the 4th, 16th, 64th, … routed entry and at the end of the run.

    Args:
        writer: sends figures to the trackers of the run.
        expert_names: the experts.
    """

    def __init__(self, writer: FigureWriter, expert_names: tuple[str, ...]) -> None:
        self.writer, self.expert_names = writer, expert_names
        self.entries, self.noted = 0, defaultdict[str, list[Tensor]](list)
        self.sample: TokenSample | None = None

    @property
    def due(self) -> bool:
        """Tell whether the last entry is one of those to draw at."""
        return self.entries in {4**power for power in range(1, 16)}

    def note(self, weights: Tensor, sigma: Tensor, batch: dict[str, Tensor] | None) -> None:
        """Note the last batch before a routed log entry.

        Args:
            weights: `(B, E)`, `(B, T, E)` or, per layer, `(B, L, E)`.
            sigma: `(B,)`, noise levels.
            batch: with `src` and `mask`; without it weights are drawn over sigma only.
        """
        self.entries += 1
        weights = weights.detach().float().cpu()
        self.noted["weights"].append(weights if weights.ndim == 2 else weights.mean(1))
        self.noted["sigma"].append(sigma.float().cpu())
        if batch is None:
            return
        info = masks.analyze(batch["mask"])
        self.noted["area"].append(info.area_ratio.cpu())
        self.noted["edge"].append(info.edge_complexity.cpu())
        rows, columns = (side // PIXELS_PER_TOKEN for side in batch["mask"].shape[-2:])
        if weights.ndim == 3 and weights.shape[1] == rows * columns:
            self.sample = TokenSample(
                weights[0].view(rows, columns, -1), batch["src"][0], batch["mask"][0]
            )

    def draw(self, step: int) -> None:
        """Draw what was noted of the latest samples."""
        if not self.noted:
            return
        found = {name: torch.cat(values)[-LATEST:] for name, values in self.noted.items()}
        names = self.expert_names
        figures = {"sigma": plots.weights_over_sigma(found["sigma"], found["weights"], names)}
        if "area" in found:
            figures["mask_size"] = plots.weights_by_area(found["area"], found["weights"], names)
            figures["edge_complexity"] = plots.weights_by_edge_complexity(
                found["edge"], found["weights"], names
            )
        if self.sample is not None:
            figures["tokens"] = plots.token_weights(
                self.sample.weights, names, image=self.sample.image, mask=self.sample.mask
            )
        for name, figure in figures.items():
            self.writer.add_figure(f"routing/{name}", figure, step)


def usage_over_training(metrics: Path) -> Figure:
    """Draw the routing weights in a run's `metrics.jsonl`, their entropy, and where routing began.

    Of a run that was taken up at an earlier step, what it went back over is left out.
    """
    entries: list[dict[str, float]] = []
    for line in metrics.read_text().splitlines():
        entry = json.loads(line)
        while entries and entries[-1]["step"] >= entry["step"]:
            entries.pop()
        if "routing/entropy" in entry:
            entries.append(entry)
    weights = {
        key.removeprefix("routing/"): [entry[key] for entry in entries]
        for key in entries[0]
        if key.startswith("routing/") and key != "routing/entropy" and not key.endswith("_usage")
    }
    routed = [entry["step"] for entry in entries if "routing/expert_0_usage" in entry]
    return plots.usage_over_training(
        [entry["step"] for entry in entries],
        list(zip(*weights.values(), strict=True)),
        list(weights),
        entropy=[entry["routing/entropy"] for entry in entries],
        phases={"routed": routed[0]} if routed else None,
    )
