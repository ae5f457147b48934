from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from moe_lora import masks
from reporting.routing_figures import LATEST, RoutingFigures, usage_over_training

NAMES = ("removal_expert", "background_expert", "completion_expert")


class Writer:
    """Keep what TensorBoard would be given."""

    def __init__(self) -> None:
        self.figures: dict[tuple[str, int], Figure] = {}

    def add_figure(self, tag: str, figure: Figure, step: int) -> None:
        self.figures[tag, step] = figure


def a_batch(size: tuple[int, int] = (32, 48)) -> dict[str, torch.Tensor]:
    mask = torch.zeros(2, 1, *size)
    mask[0, :, :16, :24], mask[1, :, ::2] = 1, 1
    return {"src": torch.rand(2, 3, *size), "mask": mask}


def make() -> RoutingFigures:
    return RoutingFigures(Writer(), NAMES)


def test_what_was_noted_is_drawn() -> None:
    figures, batch = make(), a_batch()
    weights, sigma = torch.rand(2, 3).softmax(-1), torch.tensor([0.25, 0.75])
    for _ in range(3):
        figures.note(weights.requires_grad_(), sigma, batch)
    figures.draw(7)
    figures = figures.writer.figures
    assert set(figures) == {
        ("routing/sigma", 7),
        ("routing/mask_size", 7),
        ("routing/edge_complexity", 7),
    }
    info = masks.analyze(batch["mask"])
    for name, values in (
        ("sigma", sigma),
        ("mask_size", 100 * info.area_ratio),
        ("edge_complexity", info.edge_complexity),
    ):
        points = figures[f"routing/{name}", 7].axes[0].collections[0].get_offsets()
        assert points[:, 0].tolist() == pytest.approx(values.tolist() * 3, abs=1e-5)
        assert points[:, 1].tolist() == pytest.approx(weights[:, 0].tolist() * 3)


def test_token_weights_are_laid_over_the_first_image_of_the_last_batch() -> None:
    figures, batch = make(), a_batch()
    weights = torch.rand(2, 2 * 3, 3).softmax(-1)
    figures.note(weights, torch.tensor([0.25, 0.75]), batch)
    figures.draw(1)
    axes = figures.writer.figures["routing/tokens", 1].axes[1]
    shown = torch.tensor(axes.images[1].get_array())
    torch.testing.assert_close(shown.float(), weights[0, :, 0].view(2, 3))


def test_weights_of_layers_are_no_tokens() -> None:
    figures = make()
    figures.note(torch.rand(2, 5, 3).softmax(-1), torch.tensor([0.25, 0.75]), a_batch())
    figures.draw(1)
    assert ("routing/tokens", 1) not in figures.writer.figures
    assert ("routing/sigma", 1) in figures.writer.figures


def test_without_a_batch_only_sigma_is_drawn_and_without_notes_nothing() -> None:
    figures = make()
    figures.draw(0)
    figures.note(torch.rand(2, 3).softmax(-1), torch.tensor([0.25, 0.75]), None)
    figures.draw(1)
    assert set(figures.writer.figures) == {("routing/sigma", 1)}


def test_ever_fewer_entries_are_drawn_and_only_the_latest_samples() -> None:
    figures, due = make(), []
    for entry in range(1, 70):
        figures.note(torch.full((20, 3), 1 / 3), torch.full((20,), entry / 100), None)
        if figures.due:
            due.append(entry)
    assert due == [4, 16, 64]
    figures.draw(1)
    points = figures.writer.figures["routing/sigma", 1].axes[0].collections[0].get_offsets()
    assert len(points) == LATEST
    assert points[0, 0] == pytest.approx((69 - LATEST // 20 + 1) / 100)


def entry(step: int, weight: float, *, routed: bool) -> str:
    values = {
        "step": step,
        "loss/total": 1.0,
        "routing/removal_expert": weight,
        "routing/b": 1 - weight,
        "routing/entropy": 0.9,
    }
    return json.dumps(values | ({"routing/expert_0_usage": 1} if routed else {}))


def test_the_course_of_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    lines = [entry(10, 0.5, routed=False), entry(20, 0.6, routed=True), entry(30, 0.7, routed=True)]
    metrics.write_text("\n".join(lines))
    axes = usage_over_training(metrics).axes[0]
    assert [line.get_label() for line in axes.lines[:3]] == ["removal", "b", "entropy / log E"]
    assert list(axes.lines[0].get_xdata()) == [10, 20, 30]
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.6, 0.7]
    assert list(axes.lines[1].get_ydata()) == pytest.approx([0.5, 0.4, 0.3])
    assert [text.get_text() for text in axes.texts] == ["routed"]
    assert axes.texts[0].xy[0] == 20
    metrics.write_text("\n".join(lines[:1]))
    assert not usage_over_training(metrics).axes[0].texts


def test_steps_that_a_resumed_run_went_back_over_count_once(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    weights = {10: 0.1, 20: 0.2, 30: 0.3}
    lines = [entry(step, weight, routed=True) for step, weight in weights.items()]
    metrics.write_text("\n".join([*lines, entry(20, 0.4, routed=True)]))
    axes = usage_over_training(metrics).axes[0]
    assert list(axes.lines[0].get_xdata()) == [10, 20]
    assert list(axes.lines[0].get_ydata()) == [0.1, 0.4]
