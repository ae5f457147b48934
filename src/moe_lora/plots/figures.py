"""Figures, colors and input conversion shared by all plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colors of Okabe and Ito, safe for color-blind readers, without yellow, which is hard to see on
# white, and black, which marks everything except experts.
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
KNOWN = {"removal": PALETTE[0], "background": PALETTE[1], "completion": PALETTE[2]}
LINE_STYLES = ("-", "--", "-.", ":")

WIDTH, HEIGHT, DPI = 8.0, 4.5, 100
"""Default size in inches, and pixels per inch: 800 × 450 pixels."""


class SupportsArray(Protocol):
    """Tensors and arrays."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any: ...


Numbers = Sequence[Any] | SupportsArray


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """Create a figure outside `pyplot`.

    Args:
        width: width in inches of 100 pixels.
        height: height in inches of 100 pixels.

    Returns:
        An empty figure.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ModuleNotFoundError(
            "moe_lora.plots needs matplotlib, which is not installed. Install it with "
            "`pip install 'moe-lora[plots]'`.",
            name="matplotlib",
        ) from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def short_name(name: str) -> str:
    """Return an expert's name without `_expert`."""
    return name.removesuffix("_expert")


def expert_colors(expert_names: Sequence[str]) -> dict[str, str]:
    """Return the color of every expert, the same in all figures.

    The removal, background and completion experts have fixed colors. Other experts cycle through
    the remaining colors of a palette of seven that is safe for color-blind readers.

    Args:
        expert_names: expert names of one adapter.

    Returns:
        Hexadecimal color by expert name.

    Example:
        >>> expert_colors(["other", "removal_expert"])
        {'other': '#0072B2', 'removal_expert': '#D55E00'}
    """
    taken = [KNOWN[short_name(name)] for name in expert_names if short_name(name) in KNOWN]
    free = [color for color in PALETTE if color not in taken]
    colors: dict[str, str] = {}
    others = 0
    for name in expert_names:
        if short_name(name) in KNOWN:
            colors[name] = KNOWN[short_name(name)]
        else:
            colors[name] = free[others % len(free)]
            others += 1
    return colors


def line_styles(expert_names: Sequence[str]) -> dict[str, str]:
    """Return the line style of every expert; it changes when the colors repeat."""
    return {
        name: LINE_STYLES[index // len(PALETTE) % len(LINE_STYLES)]
        for index, name in enumerate(expert_names)
    }


def numbers(values: Numbers, name: str) -> Tensor:
    """Convert values to a float64 tensor on the CPU.

    Args:
        values: a tensor, an array, or a list of numbers, lists or tensors of one shape.
        name: name of the argument for error messages.

    Returns:
        The values, detached.

    Raises:
        ValueError: if a value is not finite.
    """
    if isinstance(values, Sequence) and values and isinstance(values[0], Tensor):
        values = torch.stack(list(values))
    tensor = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if not tensor.isfinite().all():
        raise ValueError(f"Expected `{name}` to be finite, but got NaN or infinite values.")
    return tensor


def one_per_sample(values: Numbers, name: str) -> Tensor:
    """Convert values to `(N,)`, N > 0.

    Raises:
        ValueError: if the shape is not (N,), or N is 0.
    """
    tensor = numbers(values, name)
    if tensor.ndim != 1 or len(tensor) == 0:
        raise ValueError(
            f"Expected `{name}` to have shape (N,) with N > 0, but got {tuple(tensor.shape)}."
        )
    return tensor


def weights_of_samples(weights: Numbers, samples: int, expert_names: Sequence[str]) -> Tensor:
    """Convert routing weights to `(N, E)`, averaging token-level weights over the tokens.

    Args:
        weights: `(N, E)` or `(N, T, E)`.
        samples: number of samples N.
        expert_names: names of the E experts.

    Raises:
        ValueError: if the shape is another.
    """
    tensor, experts = numbers(weights, "weights"), len(expert_names)
    if tensor.ndim == 3:
        tensor = tensor.mean(1)
    if tensor.shape != (samples, experts):
        raise ValueError(
            f"Expected `weights` to have shape (N={samples}, E={experts}) or (N, tokens, E), but "
            f"got {tuple(tensor.shape)}."
        )
    return tensor


def weight_axes(figure: Figure, xlabel: str) -> Axes:
    """Add axes with routing weights in [0, 1] on the y axis."""
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel="mean routing weight", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def add_legend(figure: Figure, axes: Axes, title: str | None) -> None:
    """Add a title and a legend above the axes."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(labels), 5),
        frameon=False,
        title=title,
        title_fontsize=12,
    )


def draw_uniform(axes: Axes, experts: int) -> None:
    """Draw a line at the uniform weight 1/E."""
    axes.axhline(1 / experts, color="black", linewidth=0.8, alpha=0.5, linestyle=(0, (1, 3)))


def draw_phases(axes: Axes, phases: Mapping[str, float]) -> None:
    """Draw a line at the start of each phase, with names in rows that do not overlap."""
    for start in phases.values():
        axes.axvline(start, color="gray", linewidth=1)
    low, high = axes.get_xlim()
    ends: list[float] = []
    for name, start in sorted(phases.items(), key=lambda item: item[1]):
        left = (start - low) / (high - low)
        level = next((i for i, end in enumerate(ends) if end < left), len(ends))
        ends[level : level + 1] = [left + 0.02 + 0.011 * len(name)]
        axes.annotate(
            name,
            (start, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 12 * level),
            textcoords="offset points",
            color="dimgray",
            fontsize=9,
        )
