from __future__ import annotations

import pytest
import torch

from moe_lora.losses import latent_windows
from moe_lora.losses.decoding.windows import Window, check_agreement, check_windows


def test_windows_hold_the_mask_and_the_margin_within_the_latents() -> None:
    mask = torch.zeros(4, 1, 64, 96)
    mask[0, :, 17:23, 40:41] = 1  # within rows 2 and column 5
    mask[1, :, 0, 95] = 1
    mask[2] = 1
    assert latent_windows(mask, (8, 12), 0) == [
        (5, 2, 6, 3),
        (11, 0, 12, 1),
        (0, 0, 12, 8),
        (0,) * 4,
    ]
    assert latent_windows(mask, (8, 12), 2) == [
        (3, 0, 8, 5),
        (9, 0, 12, 3),
        (0, 0, 12, 8),
        (0,) * 4,
    ]


def test_windows_where_latents_and_pixels_do_not_divide() -> None:
    mask = torch.zeros(1, 1, 10, 10)
    mask[..., 3, 6] = 1
    # Of four latents per side, each 2.5 pixels: row 3 is in the second, column 6 in the third.
    assert latent_windows(mask, (4, 4), 0) == [(2, 1, 3, 2)]


def test_crumbs_of_a_resized_mask_do_not_count() -> None:
    mask = torch.full((1, 1, 16, 16), 0.04)
    mask[..., 9, 9] = 0.06
    assert latent_windows(mask, (2, 2), 0) == [(1, 1, 2, 2)]


@pytest.mark.parametrize("margin", [-1, 1.5, True, None])
def test_a_margin_that_is_none_raises(margin: object) -> None:
    with pytest.raises(ValueError, match="Expected `margin` to be an integer >= 0"):
        latent_windows(torch.zeros(1, 1, 8, 8), (1, 1), margin)


def test_a_window_cuts_and_scales() -> None:
    features = torch.arange(24).view(1, 1, 4, 6)
    window = Window(1, 0, 3, 2)
    assert window.of(features).flatten().tolist() == [1, 2, 7, 8]
    assert window.times(8) == (8, 0, 24, 16)
    assert not window.empty
    assert Window(0, 0, 0, 0).empty


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "one entry for each of 1 samples, but got 0"),
        ([(0, 0, 2, 5)], "within 6 columns and 4 rows, but got"),
        ([(0, 0, 7, 2)], "within 6 columns"),
        ([(-1, 0, 2, 2)], "within 6 columns"),
        ([(3, 0, 2, 2)], "within 6 columns"),
    ],
)
def test_windows_outside_the_latents_raise(windows: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_windows(windows, torch.zeros(1, 4, 4, 6))


def test_values_that_rounding_does_not_explain_raise() -> None:
    whole = torch.zeros(1, 3, 4, 4)
    check_agreement(whole + 9e-3, whole)
    check_agreement(whole.bfloat16() + 0.09, whole.bfloat16())
    check_agreement(whole + torch.nan, whole + torch.nan)
    with pytest.raises(ValueError, match=r"within 0.01, but got a difference of 0.02"):
        check_agreement(whole + 0.02, whole)
    with pytest.raises(ValueError, match=r"but got \(1, 3, 2, 2\)"):
        check_agreement(whole[..., :2, :2], whole)
