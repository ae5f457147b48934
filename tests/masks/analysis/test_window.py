from __future__ import annotations

import pytest
import torch

from moe_lora.masks.analysis.window import window_around


def test_resampling_is_the_area_average() -> None:
    """Against the slow way: repeat every pixel, cut the window out, average its cells."""
    values = torch.rand(1, 1, 20, 24, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[3, 2, 21, 18]])
    window = window_around(box, (20, 24), cells=14, margin=1)
    assert window.cell.item() == pytest.approx(18 / 12)
    fine = values[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    fine = torch.nn.functional.pad(fine[None, None], (20, 20, 20, 20), "replicate")[0, 0]
    left, top = round(2 * (12 - 10.5)) + 20, round(2 * (10 - 10.5)) + 20
    cut = fine[top : top + 42, left : left + 42]
    expected = cut.view(14, 3, 14, 3).mean((1, 3))
    torch.testing.assert_close(window.resample(values)[0, 0], expected)


def test_small_boxes_are_copied_pixel_by_pixel() -> None:
    values = torch.rand(1, 1, 40, 40)
    window = window_around(torch.tensor([[10, 11, 15, 18]]), (40, 40), cells=16, margin=2)
    assert window.cell.item() == 1
    got = window.resample(values)[0, 0]
    assert torch.equal(got, values[0, 0, 6:22, 4:20])
    assert torch.equal(window.in_image, torch.ones(1, 1, 16, 16))


def test_cells_outside_the_image_are_known() -> None:
    window = window_around(torch.tensor([[0, 0, 4, 8]]), (8, 4), cells=64, margin=2)
    in_image = window.in_image[0, 0]
    assert in_image.shape == (12, 12)
    assert in_image.sum() == 32
