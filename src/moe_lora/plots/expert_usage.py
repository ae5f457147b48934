"""How a run went."""

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
    short,
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
    """Draw how much every expert was used in the course of a run.

    Args:
        steps: `(N,)`, optimizer steps of the log entries.
        weights: `(N, E)`, mean routing weights at each (`RoutingStats.mean_weights`).
        expert_names: the experts, in the order of the weights.
        entropy: `(N,)`, in [0, 1] (`RoutingStats.entropy`), drawn dotted.
        phases: the step at which each named phase began, drawn as a vertical line.
        title: of the picture.

    Returns:
        One line for every expert; a fine dotted one marks 1/E.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for shapes that do not fit, or values that are not finite.

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
        # Uniform weights lie on top of each other: each line leaves the rims of those below.
        axes.plot(
            x.tolist(),
            y[:, index].tolist(),
            label=short(name),
            color=colors[name],
            linestyle=styles[name],
            linewidth=2 + (len(expert_names) - 1 - index) * min(1.2, 4 / len(expert_names)),
            marker="o" if len(x) == 1 else "",
        )
    if entropy is not None:
        values = one_per_sample(entropy, "entropy")
        if len(values) != len(x):
            raise ValueError(
                f"Expected `entropy` to have one value for each of the {len(x)} `steps`, but got "
                f"{len(values)}."
            )
        axes.plot(x.tolist(), values.tolist(), "k:", label="entropy / log E")
    draw_uniform(axes, len(expert_names))
    draw_phases(axes, phases or {})
    add_legend(figure, axes, title)
    return figure
