"""Draw how one image was routed: bars, a curve over the noise levels, and a map by token."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from image_session.routing_trace import RoutingTrace
from moe_lora import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BAR = """
<div class="expert-row">
  <span class="expert-name">{name}</span>
  <span class="expert-track"><span class="expert-bar" style="width: {percent:.1f}%; background: \
{color}"></span></span>
  <span class="expert-weight">{weight:.3f}</span>
</div>"""

NO_EXPERTS = "The model has no experts. Start the app with a checkpoint to see its routing."

NO_TOKEN_MAP = {
    "sample": "This router gives all tokens of an image the same weights. A checkpoint that was "
    "trained with `--router token_removal` has a map by token.",
    "layer": "This router gives every layer weights of its own, the same for all tokens. A "
    "checkpoint that was trained with `--router token_removal` has a map by token.",
    "token": "The tokens of this call form no grid.",
}
"""Why there is no map, by what has weights of its own."""


def short_name(expert: str) -> str:
    """Return an expert's name without `_expert`."""
    return expert.removesuffix("_expert")


def weight_bars(trace: RoutingTrace | None, expert_names: Sequence[str]) -> str:
    """Return the mean weight of every expert as bars, in HTML.

    Args:
        trace: of the removal; `None` for a model without experts.
        expert_names: in the order of the weights.
    """
    if trace is None:
        return f"<p>{NO_EXPERTS}</p>"
    colors = plots.expert_colors(expert_names)
    rows = [
        BAR.format(
            name=html.escape(short_name(name)),
            percent=100 * min(1.0, weight),
            color=colors[name],
            weight=weight,
        )
        for name, weight in zip(expert_names, trace.mean.tolist(), strict=True)
    ]
    over = {"sample": "", "token": " and tokens", "layer": " and layers"}[trace.varies]
    return f"<p>Weights of this image, averaged over the steps{over}.</p>{''.join(rows)}"


def weights_over_noise(trace: RoutingTrace, expert_names: Sequence[str]) -> Image.Image:
    """Return the curves of the weights over the noise levels, mode RGB."""
    from matplotlib.figure import Figure

    figure, colors = (
        Figure(figsize=(8, 4.5), layout="constrained"),
        plots.expert_colors(expert_names),
    )
    axes = figure.add_subplot()
    for index, name in enumerate(expert_names):
        weights = trace.weights[:, index].tolist()
        axes.plot(trace.sigma.tolist(), weights, "o-", color=colors[name], label=short_name(name))
    axes.set(xlabel="noise level σ (1 = pure noise, 0 = image)", ylabel="routing weight")
    axes.set(xlim=(1.02, -0.02), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(len(expert_names), 5), frameon=False)
    return drawn(figure)


def token_maps(
    trace: RoutingTrace, expert_names: Sequence[str]
) -> list[tuple[Image.Image, str]] | None:
    """Return a heat map on the image for every expert, with its caption.

    Args:
        trace: of the removal.
        expert_names: in the order of the weights.

    Returns:
        Images in mode RGB and captions; `None` where the router does not tell tokens apart.
    """
    if trace.tokens is None:
        return None
    image = np.asarray(trace.tokens.image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    mask = np.asarray(trace.tokens.mask.convert("L"), np.float32) / 255
    return [
        (token_map(trace.tokens.weights[..., [index]], name, image, mask), short_name(name))
        for index, name in enumerate(expert_names)
    ]


def token_map(weights: Tensor, name: str, image: np.ndarray, mask: np.ndarray) -> Image.Image:
    """Return the heat map of one expert on an image, mode RGB.

    Args:
        weights: `(rows, columns, 1)`.
        name: of the expert.
        image: `(3, H, W)`, in [0, 1].
        mask: `(H, W)`, in [0, 1]; 1 = remove.
    """
    figure = plots.token_weights(weights, [name], image=image, mask=mask)
    return drawn(figure)


def drawn(figure: Figure) -> Image.Image:
    """Return the pixels of a figure, mode RGB."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("RGB")
