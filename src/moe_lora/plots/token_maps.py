"""Maps of token-level routing weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_lora.plots.figures import Numbers, expert_colors, new_figure, numbers, short_name

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
    """Draw token-level routing weights of one image as a heat map per expert.

    Args:
        weights: `(T, E)`, tokens row by row, or `(rows, columns, E)`.
        expert_names: expert names, in the order of the weights.
        grid_size: `(rows, columns)` of the tokens; required with `(T, E)`.
        image: `(3, H, W)`, in [0, 1], shown in a panel of its own and, in gray, below the maps.
        mask: `(1, H, W)` or `(H, W)`, in [0, 1]; its edge is drawn.
        limits: weights at the ends of the color scale; `None` for the smallest and largest weight.
        title: title of the figure.

    Returns:
        The figure, one panel per expert after that of the image.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if shapes do not match, or a value is not finite.

    Example:
        >>> figure = token_weights(torch.rand(6, 2), ["a", "b"], grid_size=(2, 3))
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['a', 'b']
    """
    maps = _reshape_to_grid(weights, expert_names, grid_size)
    pixels = None if image is None else _check_image(image)
    edge = None if mask is None else _check_mask(mask, pixels)
    low, high = (float(maps.min()), float(maps.max())) if limits is None else limits
    size = _image_size(maps, pixels, edge)
    panels = len(expert_names) + (pixels is not None)
    columns = min(panels, MOST_COLUMNS)
    rows = math.ceil(panels / columns)
    width = max(8.0, 2.4 * columns)
    panel = (width - 1.1) / columns * size[0] / size[1]
    figure = new_figure(width, 0.1 + 0.35 * (title is not None) + rows * (0.35 + panel))
    grid = figure.subplots(rows, columns, squeeze=False)
    spaces = list(grid.flat)
    if pixels is not None:
        axes = spaces.pop(0)
        axes.imshow(pixels.numpy(), extent=_extent(size))
        _format_axes(axes, "image", edge)
    colors = expert_colors(expert_names)
    shown = None
    for index, name in enumerate(expert_names):
        axes = spaces.pop(0)
        if pixels is not None:
            axes.imshow(pixels.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, extent=_extent(size))
        shown = axes.imshow(
            maps[..., index].numpy(),
            cmap="viridis",
            vmin=low,
            vmax=high,
            extent=_extent(size),
            alpha=1.0 if pixels is None else 0.7,
        )
        _format_axes(axes, short_name(name), edge, color=colors[name])
    for axes in spaces:
        axes.set_axis_off()
    assert shown is not None
    figure.colorbar(shown, ax=grid, label="routing weight", shrink=0.9, pad=0.02)
    if title is not None:
        figure.suptitle(title)
    return figure


def _reshape_to_grid(
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


def _check_image(image: Numbers) -> Tensor:
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


def _check_mask(mask: Numbers, pixels: Tensor | None) -> Tensor:
    tensor = numbers(mask, "mask")
    flat = tensor[0] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor
    expected = flat.shape if pixels is None else pixels.shape[:2]
    if flat.ndim != 2 or flat.shape != expected:
        size = "H, W" if pixels is None else ", ".join(map(str, expected))
        raise ValueError(
            f"Expected `mask` to have shape (1, {size}), but got {tuple(tensor.shape)}."
        )
    return flat


def _image_size(maps: Tensor, pixels: Tensor | None, edge: Tensor | None) -> tuple[int, int]:
    for known in (pixels, edge):
        if known is not None:
            return known.shape[0], known.shape[1]
    return maps.shape[0], maps.shape[1]


def _extent(size: tuple[int, int]) -> tuple[float, float, float, float]:
    return (0, size[1], size[0], 0)


def _format_axes(axes: Axes, title: str, edge: Tensor | None, *, color: str = "black") -> None:
    axes.set_title(title, color=color, fontsize=12)
    axes.set(xticks=[], yticks=[])
    if edge is None or edge.min() >= 0.5 or edge.max() < 0.5:
        return
    x = (torch.arange(edge.shape[1]) + 0.5).tolist()
    y = (torch.arange(edge.shape[0]) + 0.5).tolist()
    for line, width in (("black", 2.5), ("white", 1.2)):  # visible on dark and on light
        axes.contour(x, y, edge.numpy(), levels=[0.5], colors=[line], linewidths=width)
