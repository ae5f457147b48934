from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pictures


def test_a_sheet_has_a_cell_for_every_picture(tmp_path: Path) -> None:
    names = ("source", "mask", "truth")
    rows = [{name: torch.full((3, 16, 32), value) for name in names} for value in (0.0, 0.5)]
    pictures.contact_sheet(rows, tmp_path / "sheet.png", scale=2)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    margin, header = pictures.MARGIN, pictures.HEADER
    assert sheet.shape == (header + 2 * (32 + margin) + margin, 3 * (64 + margin) + margin, 3)
    top = header + margin
    assert (sheet[top : top + 32, margin : margin + 64] == 0).all()
    assert (sheet[top + 32 + margin : top + 64 + margin, margin : margin + 64] == 128).all()
    assert (sheet[:header] < 100).any()


def test_a_mask_tints_what_it_covers() -> None:
    src, mask = torch.full((3, 2, 2), 0.5), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    shown = pictures.show_mask(src, mask)
    assert torch.equal(shown[:, 1], src[:, 1])
    assert shown[0, 0, 0] > shown[1, 0, 0]


def test_routing_over_training_is_drawn(tmp_path: Path) -> None:
    lines = [
        {"step": step, "routing/removal_expert": 0.3, "routing/b": 0.7, "routing/entropy": 0.9}
        | ({"routing/expert_0_usage": 1} if step > 10 else {})
        for step in (10, 20)
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(json.dumps(line) for line in lines))
    pictures.plot_routing_over_training(metrics, tmp_path / "plot.png")
    assert np.array(Image.open(tmp_path / "plot.png")).std() > 1


@pytest.mark.parametrize("samples", [1, 3, 40])
def test_routing_by_mask_size_is_drawn(samples: int, tmp_path: Path) -> None:
    weights = list(torch.rand(samples, 3).softmax(-1))
    areas = torch.rand(samples).tolist()
    pictures.plot_routing_by_mask_size(
        areas, weights, ["removal_expert", "b", "c"], tmp_path / "plot.png"
    )
    assert np.array(Image.open(tmp_path / "plot.png")).std() > 1
