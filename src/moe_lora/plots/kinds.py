"""Routing weights by kind of sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_lora.plots.figures import (
    Numbers,
    add_legend,
    draw_uniform,
    expert_colors,
    new_figure,
    short_name,
    weight_axes,
    weights_of_samples,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def weights_by_kind(
    kinds: Sequence[str],
    weights: Numbers,
    expert_names: Sequence[str],
    *,
    title: str | None = None,
) -> Figure:
    """Plot the mean routing weight of every expert for each kind of sample.

    Error bars are one standard deviation over the samples of a kind.

    Args:
        kinds: the kind of each of the N samples.
        weights: `(N, E)`, routing weights in [0, 1]; or `(N, T, E)`, averaged over the tokens.
        expert_names: expert names, in the order of the weights.
        title: title of the figure.

    Returns:
        The figure: a group of bars for each kind, in the order in which the kinds appear.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if shapes do not match, or a value is not finite.

    Example:
        >>> figure = weights_by_kind(["glow", "shadow"], [[0.9, 0.1], [0.2, 0.8]], ["a", "b"])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['glow', 'shadow']
    """
    values = weights_of_samples(weights, len(kinds), expert_names)
    groups = list(dict.fromkeys(kinds))
    figure = new_figure()
    axes = weight_axes(figure, "")
    colors, width = expert_colors(expert_names), 0.8 / len(expert_names)
    for index, name in enumerate(expert_names):
        of_kinds = [values[[kind == group for kind in kinds], index] for group in groups]
        axes.bar(
            [place - 0.4 + (index + 0.5) * width for place in range(len(groups))],
            [found.mean().item() for found in of_kinds],
            width,
            yerr=[found.std(correction=0).item() for found in of_kinds],
            color=colors[name],
            label=short_name(name),
            error_kw={"elinewidth": 1, "alpha": 0.6},
        )
    axes.set_xticks(range(len(groups)), groups)
    draw_uniform(axes, len(expert_names))
    add_legend(figure, axes, title)
    return figure
