"""Expert usage during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moe_lora.plots.figures import (
    Numbers,
    add_legend,
    draw_phases,
    draw_uniform,
    expert_colors,
    line_styles,
    new_figure,
    one_per_sample,
    short_name,
    weight_axes,
    weights_of_samples,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def usage_over_training(
    steps: Numbers,
    weights: Numbers,
    expert_names: Sequence[str],
    *,
    entropy: Numbers | None = None,
    phases: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Plot the mean routing weight of every expert during training.

    Args:
        steps: `(N,)`, optimizer steps.
        weights: `(N, E)`, mean routing weights at each step (`RoutingStats.mean_weights`).
        expert_names: expert names, in the order of the weights.
        entropy: `(N,)`, in [0, 1] (`RoutingStats.entropy`), drawn as a dotted line.
        phases: start step by name of phase, drawn as vertical lines.
        title: title of the figure.

    Returns:
        The figure, one line per expert; a thin dotted line marks 1/E.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if shapes do not match, or a value is not finite.

    Example:
        >>> figure = usage_over_training([10, 20], [[0.5, 0.5], [0.7, 0.3]], ["a", "b"])
        >>> [line.get_label() for line in figure.axes[0].lines[:2]]
        ['a', 'b']
    """
    x = one_per_sample(steps, "steps")
    y = weights_of_samples(weights, len(x), expert_names)
    figure = new_figure()
    axes = weight_axes(figure, "optimizer step")
    colors, styles = expert_colors(expert_names), line_styles(expert_names)
    for index, name in enumerate(expert_names):
        # Uniform weights coincide: decreasing line widths keep every line visible.
        axes.plot(
            x.tolist(),
            y[:, index].tolist(),
            label=short_name(name),
            color=colors[name],
            linestyle=styles[name],
            linewidth=2 + (len(expert_names) - 1 - index) * min(1.2, 4 / len(expert_names)),
            marker="o" if len(x) == 1 else "",
        )
    if entropy is not None:
        values = one_per_sample(entropy, "entropy")
        if len(values) != len(x):
            raise ValueError(
                f"Expected `entropy` to have one entry for each of {len(x)} steps, but got "
                f"{len(values)}."
            )
        axes.plot(x.tolist(), values.tolist(), "k:", label="entropy / log E")
    draw_uniform(axes, len(expert_names))
    draw_phases(axes, phases or {})
    add_legend(figure, axes, title)
    return figure
