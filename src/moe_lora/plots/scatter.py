"""Scatter plots of routing weights against mask properties and noise level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_lora.masks import MaskInfo
from moe_lora.plots.figures import (
    Numbers,
    add_legend,
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

MOST_GROUPS, SMALLEST_GROUP = 8, 4


def weights_by_area(
    area: Numbers | MaskInfo,
    weights: Numbers,
    expert_names: Sequence[str],
    *,
    title: str | None = None,
) -> Figure:
    """Plot routing weights against the area of the mask.

    Points are samples. Lines connect the means of groups with equal numbers of samples; bands show
    one standard deviation within a group.

    Args:
        area: `(N,)`, masked share of the image in [0, 1]; or the `MaskInfo`.
        weights: `(N, E)`, routing weights in [0, 1]; or `(N, T, E)`, averaged over the tokens.
        expert_names: expert names, in the order of the weights.
        title: title of the figure.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if shapes do not match, or a value is not finite.

    Example:
        >>> figure = weights_by_area([0.1, 0.3], [[0.9, 0.1], [0.2, 0.8]], ["a", "b"])
        >>> figure.axes[0].get_xlabel()
        'masked share of the image, %'
    """
    values = area.area_ratio if isinstance(area, MaskInfo) else area
    x = 100 * one_per_sample(values, "area")
    return _scatter(x, weights, expert_names, "masked share of the image, %", title)


def weights_by_edge_complexity(
    edge_complexity: Numbers | MaskInfo,
    weights: Numbers,
    expert_names: Sequence[str],
    *,
    title: str | None = None,
) -> Figure:
    """Plot routing weights against the edge complexity of the mask.

    Args:
        edge_complexity: `(N,)`, in [0, 1], 0 for a disk; or the `MaskInfo`.
        weights: see `weights_by_area`.
        expert_names: expert names, in the order of the weights.
        title: title of the figure.

    Returns:
        The figure; see `weights_by_area`.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if shapes do not match, or a value is not finite.
    """
    if isinstance(edge_complexity, MaskInfo):
        edge_complexity = edge_complexity.edge_complexity
    x = one_per_sample(edge_complexity, "edge_complexity")
    label = "edge complexity of the mask (0 = disk, 1 = ragged)"
    return _scatter(x, weights, expert_names, label, title)


def weights_over_sigma(
    sigma: Numbers, weights: Numbers, expert_names: Sequence[str], *, title: str | None = None
) -> Figure:
    """Plot routing weights against the noise level.

    Args:
        sigma: `(N,)`, noise levels in [0, 1]; 1 is pure noise.
        weights: see `weights_by_area`.
        expert_names: expert names, in the order of the weights.
        title: title of the figure.

    Returns:
        The figure; see `weights_by_area`.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if shapes do not match, or a value is not finite.
    """
    x = one_per_sample(sigma, "sigma")
    label = "noise level σ (0 = image, 1 = pure noise)"
    return _scatter(x, weights, expert_names, label, title)


def groups_of(x: Tensor) -> list[Tensor]:
    """Split samples into groups of similar x and nearly equal size.

    Args:
        x: `(N,)`.

    Returns:
        Indices of every group, by increasing `x`; at most `MOST_GROUPS` groups, none of fewer
        than `SMALLEST_GROUP` samples, unless there is a single group.
    """
    count = max(1, min(MOST_GROUPS, len(x) // SMALLEST_GROUP))
    return list(torch.tensor_split(x.argsort(stable=True), count))


def _scatter(
    x: Tensor, weights: Numbers, expert_names: Sequence[str], xlabel: str, title: str | None
) -> Figure:
    y = weights_of_samples(weights, len(x), expert_names)
    figure = new_figure()
    axes = weight_axes(figure, xlabel)
    axes.set_ylabel("routing weight")
    colors, styles = expert_colors(expert_names), line_styles(expert_names)
    groups = groups_of(x)
    centers = [float(x[group].mean()) for group in groups]
    for index, name in enumerate(expert_names):
        column, color = y[:, index], colors[name]
        # Opacity decreases with the number of points, so that density stays visible.
        alpha = min(0.6, max(0.15, 40 / len(x)))
        axes.scatter(x.tolist(), column.tolist(), s=14, alpha=alpha, color=color, edgecolors="none")
        means = torch.stack([column[group].mean() for group in groups])
        spread = torch.stack([column[group].std(correction=0) for group in groups])
        axes.fill_between(
            centers,
            (means - spread).tolist(),
            (means + spread).tolist(),
            color=color,
            alpha=0.12,
            linewidth=0,
        )
        axes.plot(
            centers,
            means.tolist(),
            color=color,
            linestyle=styles[name],
            linewidth=2,
            marker="o",
            markersize=4,
            label=short_name(name),
        )
    draw_uniform(axes, len(expert_names))
    add_legend(figure, axes, title)
    return figure
