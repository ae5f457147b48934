from __future__ import annotations

import numpy as np
import torch
from matplotlib.colors import to_hex

from moe_lora.ablation import Specialization
from moe_lora.plots import expert_colors, specialization_matrix

NAMES = ("removal_expert", "background_expert", "completion_expert")
COMPONENTS = ("base", "boundary", "consistency", "detail")
RISES = torch.tensor(
    [[0.01, 0.4, 0.0, -0.1], [0.02, 0.1, 0.0, 0.0], [-0.04, 0.0, 0.0, 0.2]], dtype=torch.float64
)
PAIRS = {
    "removal_expert": "boundary",
    "background_expert": "consistency",
    "completion_expert": "detail",
}


def found(pairs: dict[str, str]) -> Specialization:
    return Specialization(
        expert_names=NAMES,
        component_names=COMPONENTS,
        rises=RISES,
        spreads=RISES.abs() / 2,
        baseline=torch.tensor([1.0, 0.5, 0.25, 0.125], dtype=torch.float64),
        counts=torch.full((4,), 7),
        pairs=pairs,
    )


def test_cells_hold_rises_and_colors_their_share_of_the_column() -> None:
    figure = specialization_matrix(found({}))
    axes, bar = figure.axes
    shown = np.array(axes.images[0].get_array())
    np.testing.assert_allclose(shown[:, 0], [0.25, 0.5, -1.0])
    np.testing.assert_allclose(shown[:, 2], 0.0)
    assert np.abs(shown).max() == 1.0
    assert axes.images[0].get_clim() == (-1, 1)
    texts = {tuple(map(round, text.get_position())): text for text in axes.texts}  # (column, row)
    assert len(texts) == 12
    assert texts[1, 0].get_text() == "+0.4\n± 0.2"
    assert texts[0, 2].get_text() == "-0.04\n± 0.02"
    assert (texts[1, 0].get_color(), texts[1, 2].get_color()) == ("white", "black")
    assert bar.get_ylabel() == "rise / largest of the column"
    assert figure.get_suptitle() == ""


def test_rows_are_experts_in_their_colors_and_columns_components_with_their_values() -> None:
    axes = specialization_matrix(found({})).axes[0]
    rows = axes.get_yticklabels()
    assert [label.get_text() for label in rows] == ["removal", "background", "completion"]
    colors = expert_colors(NAMES)
    assert [to_hex(label.get_color()) for label in rows] == [c.lower() for c in colors.values()]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "base\n1",
        "boundary\n0.5",
        "consistency\n0.25",
        "detail\n0.125",
    ]
    assert axes.get_ylabel() == "rise without"


def test_pairs_are_framed_and_the_score_is_the_title() -> None:
    figure = specialization_matrix(found(PAIRS))
    frames = [patch.get_xy() for patch in figure.axes[0].patches]
    assert [(round(x + 0.47), round(y + 0.45)) for x, y in frames] == [(1, 0), (2, 1), (3, 2)]
    # 0.4 / 0.5 of boundary, nothing of consistency, all of detail.
    assert figure.get_suptitle() == "diagonal share 0.60 (no specialization: 0.33)"
    assert specialization_matrix(found(PAIRS), title="Mine").get_suptitle() == "Mine"


def test_many_components_make_it_wider() -> None:
    small = specialization_matrix(found({}))
    names = tuple(f"c{i}" for i in range(12))
    large = Specialization(
        expert_names=NAMES,
        component_names=names,
        rises=RISES.repeat(1, 3),
        spreads=RISES.repeat(1, 3).abs(),
        baseline=torch.ones(12, dtype=torch.float64),
        counts=torch.ones(12, dtype=torch.int64),
        pairs={},
    )
    assert small.get_figwidth() == 8
    assert specialization_matrix(large).get_figwidth() > 15
