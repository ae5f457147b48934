from __future__ import annotations

import io

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from moe_lora.plots import expert_colors, usage_over_training

NAMES = ["removal_expert", "background_expert", "completion_expert"]
STEPS = [10, 20, 30]
WEIGHTS = torch.tensor([[0.3, 0.3, 0.4], [0.2, 0.5, 0.3], [0.1, 0.7, 0.2]])


def legend_of(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_every_expert_has_a_line_through_its_weights() -> None:
    figure = usage_over_training(STEPS, WEIGHTS, NAMES, entropy=[1.0, 0.9, 0.8])
    (axes,) = figure.axes
    colors = expert_colors(NAMES)
    for index, name in enumerate(NAMES):
        line = axes.lines[index]
        assert list(line.get_xdata()) == STEPS
        assert list(line.get_ydata()) == pytest.approx(WEIGHTS[:, index].tolist())
        assert line.get_color() == colors[name]
    assert list(axes.lines[3].get_ydata()) == [1.0, 0.9, 0.8]
    assert legend_of(figure) == ["removal", "background", "completion", "entropy / log E"]
    assert axes.get_xlabel() == "optimizer step"
    assert axes.get_ylabel() == "mean routing weight"
    assert list(axes.lines[4].get_ydata()) == [1 / 3, 1 / 3]
    low, high = axes.get_ylim()
    assert low <= 0 < 1 <= high


def test_equal_weights_can_all_be_seen() -> None:
    widths = [
        line.get_linewidth()
        for line in usage_over_training([1, 2], [[0.5, 0.5]] * 2, "ab").axes[0].lines[:2]
    ]
    assert widths[0] > widths[1] >= 2


def test_phases_are_marked_and_their_names_do_not_overlap() -> None:
    steps = list(range(0, 1001, 100))
    phases = {"routed": 500.0, "router alone": 510.0, "everything": 900.0}
    figure = usage_over_training(steps, [[0.5, 0.5]] * 11, ["a", "b"], phases=phases)
    (axes,) = figure.axes
    marks = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert marks == [500.0, 510.0, 900.0]
    assert [text.get_text() for text in axes.texts] == list(phases)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    legend = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(legend) for box in boxes)


def test_a_title_stands_above_the_legend() -> None:
    figure = usage_over_training(STEPS, WEIGHTS, NAMES, title="A run")
    (legend,) = figure.legends
    FigureCanvasAgg(figure).draw()
    title = legend.get_title()
    assert title.get_text() == "A run"
    assert title.get_window_extent().y0 >= legend.get_texts()[0].get_window_extent().y1


def test_a_figure_is_800_pixels_wide_and_one_entry_is_seen() -> None:
    figure = usage_over_training([5], [[0.2, 0.8]], ["a", "b"])
    assert figure.axes[0].lines[0].get_marker() == "o"
    file = io.BytesIO()
    figure.savefig(file)
    assert Image.open(file).size == (800, 450)


def test_what_does_not_fit_raises() -> None:
    with pytest.raises(ValueError, match=r"shape \(N=2, E=3\)"):
        usage_over_training(STEPS[:2], WEIGHTS, NAMES)
    with pytest.raises(ValueError, match="each of 3 steps, but got 2"):
        usage_over_training(STEPS, WEIGHTS, NAMES, entropy=[1.0, 1.0])
