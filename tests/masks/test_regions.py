from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.ndimage import distance_transform_cdt
from torch import Tensor

from moe_lora.masks import boundary_band, to_latent, to_tokens


@pytest.mark.parametrize("width", [1, 3, 40])
def test_band_is_the_pixels_within_chebyshev_distance(
    blobs: Callable[..., Tensor], width: int
) -> None:
    masks = blobs(3, 48, 3.0)
    band = boundary_band(masks, width)
    for mask, got in zip(masks[:, 0].numpy() > 0.5, band[:, 0].numpy(), strict=True):
        outwards = distance_transform_cdt(~mask, metric="chessboard")
        inwards = distance_transform_cdt(mask, metric="chessboard")
        expected = (outwards + inwards) <= width
        assert (got == expected).all()


def test_band_of_a_square_has_the_known_area() -> None:
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., 10:30, 10:30] = 1
    assert boundary_band(mask, 2).sum() == 24**2 - 16**2


def test_image_border_is_no_edge() -> None:
    mask = torch.zeros(1, 1, 6, 10)
    mask[..., 6:] = 1
    band = boundary_band(mask, 2)
    assert band[0, 0].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 0, 0]] * 6


@pytest.mark.parametrize("value", [0.0, 0.4, 0.5, 1.0])
def test_empty_and_full_masks_have_no_band(value: float) -> None:
    assert boundary_band(torch.full((2, 1, 9, 7), value), 3).abs().sum() == 0


def test_half_counts_as_inside() -> None:
    mask = torch.tensor([0.0, 0.49, 0.5, 1.0]).view(1, 1, 1, 4)
    assert boundary_band(mask, 1).flatten().tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("width", [0, -1, 1.0, True, None])
def test_band_width_is_a_positive_integer(width: object) -> None:
    with pytest.raises(ValueError, match="Expected `width` to be an integer >= 1"):
        boundary_band(torch.zeros(1, 1, 8, 8), width)  # type: ignore[arg-type]


def test_latent_and_tokens_are_block_means_row_by_row() -> None:
    mask = torch.rand(2, 1, 32, 48)
    expected = mask.view(2, 4, 8, 6, 8).mean((2, 4))
    torch.testing.assert_close(to_latent(mask, (4, 6)), expected[:, None])
    torch.testing.assert_close(to_tokens(mask, (4, 6)), expected.reshape(2, 24))


def test_latent_of_an_indivisible_size_stays_in_range() -> None:
    latent = to_latent(torch.ones(1, 1, 33, 50), (4, 7))
    torch.testing.assert_close(latent, torch.ones(1, 1, 4, 7))


def test_gradient_reaches_the_mask() -> None:
    mask = torch.rand(1, 1, 16, 16, requires_grad=True)
    to_tokens(mask, (2, 2)).sum().backward()
    torch.testing.assert_close(mask.grad, torch.full_like(mask, 1 / 64))
