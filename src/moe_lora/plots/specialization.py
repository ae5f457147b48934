"""Heat map of expert specialization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from moe_lora.plots.figures import WIDTH, expert_colors, new_figure, short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moe_lora.ablation import Specialization

DARK = 0.65
"""Share of the largest rise above which a cell needs white text."""


def specialization_matrix(found: Specialization, *, title: str | None = None) -> Figure:
    """Draw the result of `moe_lora.ablation.specialization` as a heat map.

    Each cell shows the rise of a component without an expert ± its standard deviation. Colors are
    normalized by the largest absolute rise of each component, since components have different
    units. A frame marks the component of each expert.

    Args:
        found: specialization of the experts.
        title: title of the figure; the diagonal share by default, if there is one.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    experts, components = found.rises.shape
    figure = new_figure(max(WIDTH, 2.6 + 1.1 * components), 1.7 + 0.75 * experts)
    axes = figure.add_subplot()
    largest = found.rises.abs().amax(0)
    shade = found.rises / largest.where(largest > 0, 1.0)
    shown = axes.imshow(shade.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    _label(axes, found)
    for row in range(experts):
        for column in range(components):
            _write(axes, found, shade, row, column)
    figure.colorbar(
        shown, ax=axes, label="rise / largest of the column", ticks=[-1, 0, 1], pad=0.02
    )
    if title is None and found.score is not None:
        title = f"diagonal share {found.score:.2f} (no specialization: {1 / experts:.2f})"
    if title is not None:
        figure.suptitle(title)
    return figure


def _label(axes: Axes, found: Specialization) -> None:
    baseline = zip(found.component_names, found.baseline.tolist(), strict=True)
    axes.set_xticks(
        range(len(found.component_names)), [f"{name}\n{value:.4g}" for name, value in baseline]
    )
    axes.set_yticks(
        range(len(found.expert_names)), [short_name(name) for name in found.expert_names]
    )
    colors = expert_colors(found.expert_names)
    for name, label in zip(found.expert_names, axes.get_yticklabels(), strict=True):
        label.set_color(colors[name])
        label.set_fontweight("bold")
    axes.tick_params(length=0)
    axes.set(xlabel="component, and its value with all experts", ylabel="rise without")
    axes.spines[:].set_visible(False)


def _write(axes: Axes, found: Specialization, shade: Tensor, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    rise, spread = float(found.rises[row, column]), float(found.spreads[row, column])
    axes.text(
        column,
        row,
        f"{rise:+.3g}\n± {spread:.2g}",
        ha="center",
        va="center",
        color="white" if abs(float(shade[row, column])) > DARK else "black",
        fontsize=10,
    )
    if found.pairs.get(found.expert_names[row]) == found.component_names[column]:
        axes.add_patch(
            Rectangle(
                (column - 0.47, row - 0.45), 0.94, 0.9, fill=False, edgecolor="black", linewidth=2
            )
        )
