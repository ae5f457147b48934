"""Where in the picture which expert acts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_lora.plots.figures import Numbers, expert_colors, new_figure, numbers, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 4


def token_weights(
    weights: Numbers,
    expert_names: Sequence[str],
    *,
    grid_size: tuple[int, int] | None = None,
    image: Numbers | None = None,
    mask: Numbers | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
    title: str | None = None,
) -> Figure:
    """Draw one picture's token-level weights as a heat map for every expert.

    Args:
        weights: `(T, E)` of the picture's tokens row by row, or `(rows, columns, E)`.
        expert_names: the experts, in the order of the weights.
        grid_size: `(rows, columns)` of the tokens; required with `(T, E)`.
        image: `(3, H, W)`, in [0, 1], shown beside the maps and, in gray, under them.
        mask: `(1, H, W)` or `(H, W)`, in [0, 1]; its edge is drawn.
        limits: the weights at the ends of the color scale; `None` for the smallest and the largest
            one, which shows how nearly equal weights differ.
        title: of the picture.

    Returns:
        Panels with the picture, where it is given, and one map for every expert.

    Raises:
        ModuleNotFoundError: without matplotlib.
        ValueError: for shapes that do not fit, or values that are not finite.

    Example:
        >>> figure = token_weights(torch.rand(6, 2), ["a", "b"], grid_size=(2, 3))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['a', 'b']
    """
    maps = _on_grid(weights, expert_names, grid_size)
    picture = None if image is None else _picture(image)
    edge = None if mask is None else _edge(mask, picture)
    low, high = (float(maps.min()), float(maps.max())) if limits is None else limits
    size = _size(maps, picture, edge)
    panels = len(expert_names) + (picture is not None)
    columns = min(panels, MOST_COLUMNS)
    rows = math.ceil(panels / columns)
    width = max(8.0, 2.4 * columns)
    panel = (width - 1.1) / columns * size[0] / size[1]
    figure = new_figure(width, 0.1 + 0.35 * (title is not None) + rows * (0.35 + panel))
    grid = figure.subplots(rows, columns, squeeze=False)
    spaces = list(grid.flat)
    if picture is not None:
        axes = spaces.pop(0)
        axes.imshow(picture.numpy(), extent=_extent(size))
        _finish(axes, "picture", edge)
    colors = expert_colors(expert_names)
    shown = None
    for index, name in enumerate(expert_names):
        axes = spaces.pop(0)
        if picture is not None:
            axes.imshow(picture.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, extent=_extent(size))
        shown = axes.imshow(
            maps[..., index].numpy(),
            cmap="viridis",
            vmin=low,
            vmax=high,
            extent=_extent(size),
            alpha=1.0 if picture is None else 0.7,
        )
        _finish(axes, short(name), edge, color=colors[name])
    for axes in spaces:
        axes.set_axis_off()
    assert shown is not None
    figure.colorbar(shown, ax=grid, label="routing weight", shrink=0.9, pad=0.02)
    if title is not None:
        figure.suptitle(title)
    return figure


def _on_grid(
    weights: Numbers, expert_names: Sequence[str], grid_size: tuple[int, int] | None
) -> Tensor:
    tensor, experts = numbers(weights, "weights"), len(expert_names)
    if tensor.ndim == 2 and grid_size is not None and tensor.shape[0] == math.prod(grid_size):
        tensor = tensor.view(*grid_size, -1)
    given = grid_size is None or tuple(tensor.shape[:2]) == tuple(grid_size)
    if tensor.ndim != 3 or tensor.shape[-1] != experts or not given or experts == 0:
        raise ValueError(
            f"Expected `weights` to have shape (rows, columns, E={experts}), or (tokens, E) with "
            f"`grid_size`, but got {tuple(tensor.shape)} with `grid_size` {grid_size}."
        )
    return tensor


def _picture(image: Numbers) -> Tensor:
    tensor = numbers(image, "image")
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        raise ValueError(
            f"Expected `image` to have shape (3, H, W), but got {tuple(tensor.shape)}."
        )
    if tensor.min() < 0 or tensor.max() > 1:
        raise ValueError(
            f"Expected `image` to have values in [0, 1], but got values in "
            f"[{float(tensor.min()):g}, {float(tensor.max()):g}]."
        )
    return tensor.movedim(0, -1)


def _edge(mask: Numbers, picture: Tensor | None) -> Tensor:
    tensor = numbers(mask, "mask")
    flat = tensor[0] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor
    wanted = flat.shape if picture is None else picture.shape[:2]
    if flat.ndim != 2 or flat.shape != wanted:
        size = "H, W" if picture is None else ", ".join(map(str, wanted))
        raise ValueError(
            f"Expected `mask` to have shape (1, {size}), but got {tuple(tensor.shape)}."
        )
    return flat


def _size(maps: Tensor, picture: Tensor | None, edge: Tensor | None) -> tuple[int, int]:
    for known in (picture, edge):
        if known is not None:
            return known.shape[0], known.shape[1]
    return maps.shape[0], maps.shape[1]


def _extent(size: tuple[int, int]) -> tuple[float, float, float, float]:
    return (0, size[1], size[0], 0)


def _finish(axes: Axes, title: str, edge: Tensor | None, *, color: str = "black") -> None:
    axes.set_title(title, color=color, fontsize=12)
    axes.set(xticks=[], yticks=[])
    if edge is None or edge.min() >= 0.5 or edge.max() < 0.5:
        return
    x = (torch.arange(edge.shape[1]) + 0.5).tolist()
    y = (torch.arange(edge.shape[0]) + 0.5).tolist()
    for line, width in (("black", 2.5), ("white", 1.2)):  # seen on dark and on light
        axes.contour(x, y, edge.numpy(), levels=[0.5], colors=[line], linewidths=width)
