from __future__ import annotations

import pytest
import torch

from moe_lora.plots import expert_colors, weights_by_kind

NAMES = ["shadow", "glow"]


def test_bars_are_means_and_spreads_by_kind():
    kinds = ["glow", "shadow", "glow"]
    weights = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.4, 0.6]])
    axes = weights_by_kind(kinds, weights, NAMES, title="weights").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["glow", "shadow"]
    heights = [[bar.get_height() for bar in group] for group in axes.containers if len(group) == 2]
    assert heights[0] == pytest.approx([0.3, 0.9])
    assert heights[1] == pytest.approx([0.7, 0.1])
    lines = [
        group.errorbar.lines[2][0].get_segments() for group in axes.containers if len(group) == 2
    ]
    assert lines[0][0][:, 1].tolist() == pytest.approx([0.2, 0.4])


def test_experts_have_their_colors_and_a_legend():
    figure = weights_by_kind(["a"], [[0.5, 0.5]], NAMES)
    bars = [group.patches[0] for group in figure.axes[0].containers if hasattr(group, "patches")]
    from matplotlib.colors import to_rgba

    assert [bar.get_facecolor() for bar in bars] == [
        to_rgba(expert_colors(NAMES)[name]) for name in NAMES
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES


def test_weights_of_another_number_of_samples_are_refused():
    with pytest.raises(ValueError, match="N=2"):
        weights_by_kind(["a", "b"], [[0.5, 0.5]], NAMES)
