from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from moe_lora.plots import expert_colors
from moe_lora.plots.figures import (
    LINE_STYLES,
    PALETTE,
    line_styles,
    numbers,
    one_per_sample,
    weights_of_samples,
)

REMOVAL = ["removal_expert", "background_expert", "completion_expert"]


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_matplotlib_comes_with_the_first_figure_and_pyplot_never() -> None:
    code = (
        "import sys, moe_lora.plots as p;"
        "print('matplotlib' in sys.modules);"
        "p.usage_over_training([1], [[1.0]], ['a']).savefig(__import__('io').BytesIO());"
        "print('matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    assert run(code).split() == ["False", "True", "False"]


def test_the_error_without_matplotlib_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import moe_lora.plots as p\n"
        "try: p.weights_over_sigma([0.5], [[1.0]], ['a'])\n"
        "except ModuleNotFoundError as error: print(error)"
    )
    assert run(code) == (
        "moe_lora.plots needs matplotlib, which is not installed. Install it with "
        "`pip install 'moe-lora[plots]'`."
    )


def test_an_expert_keeps_its_color_whatever_stands_beside_it() -> None:
    whole = expert_colors(REMOVAL)
    assert len(set(whole.values())) == 3
    assert expert_colors(REMOVAL[::-1]) == dict(reversed(whole.items()))
    assert expert_colors(["background"])["background"] == whole["background_expert"]
    mixed = expert_colors(["shadow", *REMOVAL, "glare"])
    assert {name: mixed[name] for name in REMOVAL} == whole
    assert len(set(mixed.values())) == 5


def test_colors_start_anew_with_another_line_style() -> None:
    names = [f"expert_{i}" for i in range(9)]
    colors, styles = expert_colors(names), line_styles(names)
    assert len(set(colors.values())) == len(PALETTE) == 7
    assert len({(colors[name], styles[name]) for name in names}) == 9
    assert styles["expert_7"] == LINE_STYLES[1]


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([[0.25, 0.75]], dtype=torch.bfloat16, requires_grad=True),
        np.array([[0.25, 0.75]], dtype=np.float32),
        [[0.25, 0.75]],
        [torch.tensor([0.25, 0.75])],
    ],
)
def test_numbers_come_as_tensors_arrays_and_lists(values: object) -> None:
    found = numbers(values, "weights")
    assert found.tolist() == [[0.25, 0.75]]
    assert (found.dtype, found.requires_grad) == (torch.float64, False)


def test_token_weights_count_by_their_mean() -> None:
    weights = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    assert weights_of_samples(weights, 1, ["a", "b"]).tolist() == [[0.75, 0.25]]


def test_what_does_not_fit_raises() -> None:
    with pytest.raises(ValueError, match=r"`sigma` to be finite"):
        numbers([0.1, float("nan")], "sigma")
    for bad, shape in (([], r"\(0,\)"), ([[1.0]], r"\(1, 1\)")):
        with pytest.raises(ValueError, match=rf"`area` to have shape \(N,\).*but got {shape}"):
            one_per_sample(bad, "area")
    with pytest.raises(ValueError, match=r"shape \(N=2, E=2\) or .* but got \(1, 2\)"):
        weights_of_samples([[0.5, 0.5]], 2, ["a", "b"])
    with pytest.raises(ValueError, match=r"E=3\).* but got \(1, 2\)"):
        weights_of_samples([[0.5, 0.5]], 1, REMOVAL)
