from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_lora.plots import token_weights

NAMES = ["removal_expert", "background_expert", "completion_expert"]
MAPS = torch.rand(4, 6, 3).softmax(-1)


@pytest.mark.parametrize("flat", [True, False])
def test_every_expert_has_its_map(flat: bool) -> None:
    weights, grid = (MAPS.flatten(0, 1), (4, 6)) if flat else (MAPS, None)
    figure = token_weights(weights, NAMES, grid_size=grid)
    panels = figure.axes[:3]
    assert [axes.get_title() for axes in panels] == ["removal", "background", "completion"]
    for index, axes in enumerate(panels):
        (shown,) = axes.images
        np.testing.assert_allclose(shown.get_array(), MAPS[..., index].numpy(), rtol=1e-6)
        assert shown.get_clim() == (0.0, 1.0)
    assert figure.axes[-1].get_ylabel() == "routing weight"


def test_the_map_lies_over_the_image_and_the_mask_is_outlined() -> None:
    image, mask = torch.rand(3, 32, 48), torch.zeros(1, 32, 48)
    mask[:, 8:24, 12:36] = 1
    figure = token_weights(MAPS, NAMES, image=image, mask=mask)
    first, *panels = figure.axes[:4]
    assert first.get_title() == "image"
    np.testing.assert_allclose(first.images[0].get_array(), image.permute(1, 2, 0), rtol=1e-6)
    for axes in panels:
        gray, shown = axes.images
        np.testing.assert_allclose(gray.get_array(), image.mean(0), rtol=1e-6)
        assert gray.get_extent() == shown.get_extent() == [0, 48, 32, 0]
        assert shown.get_alpha() < 1
    for axes in (first, *panels):
        corners = np.concatenate([path.vertices for path in axes.collections[0].get_paths()])
        assert corners.min(0).tolist() == pytest.approx([12, 8])
        assert corners.max(0).tolist() == pytest.approx([36, 24])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mask_without_an_edge_draws_none(value: float) -> None:
    figure = token_weights(MAPS, NAMES, mask=torch.full((32, 48), value))
    assert [len(axes.collections) for axes in figure.axes[:3]] == [0, 0, 0]


def test_limits_follow_the_weights_on_request() -> None:
    (shown,) = token_weights(MAPS, NAMES, limits=None).axes[0].images
    assert shown.get_clim() == pytest.approx((float(MAPS.min()), float(MAPS.max())))


def test_many_experts_go_into_rows_and_spare_panels_are_empty() -> None:
    names = [f"expert_{i}" for i in range(6)]
    figure = token_weights(torch.rand(4, 6, 6), names, title="Six")
    panels = figure.axes[:8]
    assert [axes.get_title() for axes in panels] == [*names, "", ""]
    assert [axes.axison for axes in panels] == [True] * 6 + [False] * 2
    assert figure.get_suptitle() == "Six"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": MAPS.flatten(0, 1)}, r"with `grid_size`, but got \(24, 3\)"),
        ({"weights": MAPS.flatten(0, 1), "grid_size": (4, 4)}, r"\(24, 3\) .* \(4, 4\)"),
        ({"weights": MAPS, "grid_size": (6, 4)}, r"\(4, 6, 3\) .* \(6, 4\)"),
        ({"weights": MAPS[..., :2]}, r"E=3\).* but got \(4, 6, 2\)"),
        ({"weights": MAPS, "image": torch.rand(32, 48, 3)}, r"\(3, H, W\), but got \(32, 48, 3\)"),
        ({"weights": MAPS, "image": 255 * torch.ones(3, 8, 8)}, r"in \[0, 1\], .* \[255, 255\]"),
        (
            {"weights": MAPS, "image": torch.rand(3, 8, 8), "mask": torch.rand(1, 4, 4)},
            r"`mask` to have shape \(1, 8, 8\), but got \(1, 4, 4\)",
        ),
        ({"weights": MAPS, "mask": torch.rand(2, 4, 4)}, r"\(1, H, W\), but got \(2, 4, 4\)"),
    ],
)
def test_what_does_not_fit_raises(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_weights(expert_names=NAMES, **arguments)
