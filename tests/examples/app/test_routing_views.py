from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from image_session.routing_trace import RoutingTrace, TokenMap
from moe_lora import plots
from routing_views import NO_EXPERTS, token_maps, weight_bars, weights_over_noise

NAMES = ("removal_expert", "background_expert", "<b>mine</b>")


def trace(varies: str = "sample", tokens: TokenMap | None = None) -> RoutingTrace:
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.7, 0.05, 0.25]])
    return RoutingTrace(torch.tensor([1.0, 0.5]), weights, varies, tokens)


def test_bars_show_mean_weights_and_escape_names() -> None:
    text = weight_bars(trace(), NAMES)
    assert text.count("expert-row") == 3
    assert "0.600" in text
    assert "width: 60.0%" in text
    assert "<b>mine" not in text
    assert "&lt;b&gt;mine" in text
    assert plots.expert_colors(NAMES)["removal_expert"] in text
    assert weight_bars(None, ()) == f"<p>{NO_EXPERTS}</p>"


def test_curves_have_the_colors_of_the_experts() -> None:
    shown = weights_over_noise(trace(), NAMES)
    assert shown.width >= 800
    found = {tuple(color) for color in np.array(shown).reshape(-1, 3)}
    for color in plots.expert_colors(NAMES).values():
        assert tuple(bytes.fromhex(color[1:])) in found


def test_maps_are_one_per_expert() -> None:
    image, mask = Image.new("RGB", (48, 32), "gray"), Image.new("L", (48, 32))
    mask.paste(255, (16, 8, 32, 24))
    weights = torch.zeros(2, 3, 3)
    weights[..., 0], weights[0, 0] = 1, torch.tensor([0.0, 1.0, 0.0])
    shown = token_maps(trace("token", TokenMap(weights, image, mask)), NAMES)
    assert shown is not None
    assert [caption for _, caption in shown] == ["removal", "background", "<b>mine</b>"]
    assert len({image.tobytes() for image, _ in shown}) == 3
    assert token_maps(trace(), NAMES) is None
