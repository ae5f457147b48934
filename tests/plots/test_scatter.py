from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from matplotlib.figure import Figure

from moe_lora import masks
from moe_lora.plots import (
    expert_colors,
    weights_by_area,
    weights_by_edge_complexity,
    weights_over_sigma,
)
from moe_lora.plots.scatter import groups_of

NAMES = ["removal_expert", "background_expert", "completion_expert"]
PLOTS = [weights_by_area, weights_by_edge_complexity, weights_over_sigma]


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("samples", [1, 3, 40])
def test_points_are_the_samples_and_lines_their_means(
    plot: Callable[..., Figure], samples: int
) -> None:
    x, weights = torch.rand(samples), torch.rand(samples, 3).softmax(-1)
    figure = plot(x, weights, NAMES)
    (axes,) = figure.axes
    factor = 100 if plot is weights_by_area else 1
    groups = min(8, max(1, samples // 4))
    order = x.argsort()
    for index, name in enumerate(NAMES):
        points = torch.tensor(axes.collections[2 * index].get_offsets())
        torch.testing.assert_close(points[:, 0].float(), factor * x)
        torch.testing.assert_close(points[:, 1].float(), weights[:, index])
        line = axes.lines[index]
        assert line.get_color() == expert_colors(NAMES)[name]
        assert len(line.get_xdata()) == groups
        first = order[: len(torch.tensor_split(order, groups)[0])]
        assert line.get_xdata()[0] == pytest.approx(factor * float(x[first].mean()), rel=1e-5)
        assert line.get_ydata()[0] == pytest.approx(float(weights[first, index].mean()), rel=1e-5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "removal",
        "background",
        "completion",
    ]


def test_a_band_is_one_standard_deviation_wide() -> None:
    weights = torch.tensor([0.2, 0.4, 0.4, 0.6])
    figure = weights_over_sigma(
        [0.1, 0.2, 0.3, 0.4], torch.stack([weights, 1 - weights], 1), ["a", "b"]
    )
    heights = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    deviation = (0.08 / 4) ** 0.5
    assert heights.min() == pytest.approx(0.4 - deviation)
    assert heights.max() == pytest.approx(0.4 + deviation)


def test_axes_say_what_they_are_and_in_which_unit() -> None:
    labels = [plot([0.25], [[0.5, 0.5]], ["a", "b"]).axes[0].get_xlabel() for plot in PLOTS]
    assert labels == [
        "masked share of the image, %",
        "edge complexity of the mask (0 = disk, 1 = ragged)",
        "noise level σ (0 = image, 1 = pure noise)",
    ]
    assert weights_by_area([0.25], [[0.5, 0.5]], "ab").axes[0].get_ylabel() == "routing weight"


def test_analyzed_masks_and_token_weights_are_taken_as_they_are() -> None:
    mask = torch.zeros(2, 1, 32, 32)
    mask[0, :, :8], mask[1, :, :16, ::4] = 1, 1
    info = masks.analyze(mask)
    weights = torch.rand(2, 5, 2).softmax(-1)
    area = weights_by_area(info, weights, ["a", "b"]).axes[0].collections[0].get_offsets()
    assert area[:, 0].tolist() == [25.0, 12.5]
    assert area[:, 1].tolist() == pytest.approx(weights.mean(1)[:, 0].tolist())
    edge = weights_by_edge_complexity(info, weights, ["a", "b"]).axes[0].collections[0]
    assert edge.get_offsets()[:, 0].tolist() == pytest.approx(info.edge_complexity.tolist())


@pytest.mark.parametrize("samples", [1, 3, 4, 7, 8, 9, 33, 500])
def test_groups_are_neighbors_of_like_size(samples: int) -> None:
    x = torch.rand(samples)
    groups = groups_of(x)
    sizes = [len(group) for group in groups]
    assert sum(sizes) == samples
    assert len(groups) == 1 or min(sizes) >= 4
    assert len(groups) <= 8
    assert max(sizes) - min(sizes) <= 1
    for left, right in itertools.pairwise(groups):
        assert x[left].max() <= x[right].min()


def test_what_does_not_fit_raises() -> None:
    for plot in PLOTS:
        with pytest.raises(ValueError, match=r"shape \(N=2, E=2\)"):
            plot([0.1, 0.2], [[0.5, 0.5]], ["a", "b"])
        with pytest.raises(ValueError, match="finite"):
            plot([0.1], [[float("inf"), 0.5]], ["a", "b"])
