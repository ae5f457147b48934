from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lora.metrics import measure, psnr, regions, seam_error, ssim
from moe_lora.metrics.regions import REGIONS


def test_everything_is_what_the_single_metrics_say(images: Any) -> None:
    prediction, target, source, mask = images
    found = measure(prediction, target, mask, source)
    names = [f"{metric}/{region}" for metric in ("psnr", "ssim") for region in REGIONS]
    assert list(found) == [*names, "seam_error"]
    for name, region in regions(mask, source, target).items():
        assert found[f"psnr/{name}"].tolist() == psnr(prediction, target, region).tolist()
        assert found[f"ssim/{name}"].tolist() == ssim(prediction, target, region).tolist()
        assert torch.equal(found[f"psnr/{name}"].pixels, region.flatten(1).sum(1))
    assert found["seam_error"].tolist() == seam_error(prediction, target, mask).tolist()


def test_missing_regions_are_missing_and_nothing_is_nan(images: Any) -> None:
    found = measure(*images[:2], images.mask, images.source)
    missing = {name for name, value in found.items() if None in value.tolist()}
    assert missing == {
        *(f"{metric}/{region}" for metric in ("psnr", "ssim") for region in ("inside", "boundary")),
        *("psnr/effect", "ssim/effect", "seam_error"),
    }
    assert all(torch.isfinite(value.values).all() for value in found.values())


def test_full_masks_have_no_outside(images: Any) -> None:
    found = measure(*images[:2], torch.ones_like(images.mask), images.source)
    for name in ("psnr/outside", "psnr/boundary", "psnr/effect", "seam_error"):
        assert found[name].tolist() == [None] * 3
    assert found["psnr/inside"].tolist() == found["psnr/whole"].tolist()


def test_options_reach_the_regions(images: Any) -> None:
    prediction, target, source, mask = images
    found = measure(prediction, target, mask, source, band_width=5, effect_threshold=0.2)
    where = regions(mask, source, target, band_width=5, effect_threshold=0.2)
    for name in ("boundary", "effect"):
        assert torch.equal(found[f"psnr/{name}"].pixels, where[name].flatten(1).sum(1))
    assert "psnr/effect" not in measure(prediction, target, mask)


class Distance(nn.Module):
    def forward(self, first: Tensor, second: Tensor, normalize: bool) -> Tensor:
        return (first - second).abs().mean(1, keepdim=True)


def test_lpips_is_measured_when_there_is_a_network(images: Any) -> None:
    found = measure(*images[:2], images.mask, images.source, lpips_model=Distance())
    assert {f"lpips/{region}" for region in REGIONS} <= set(found)
    expected = (images.prediction - images.target).abs().mean().item()
    assert found["lpips/whole"].mean() == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_its_samples(images: Any) -> None:
    together = measure(*images[:2], images.mask, images.source)
    for index in range(3):
        one = slice(index, index + 1)
        alone = measure(*(p[one] for p in images[:2]), images.mask[one], images.source[one])
        for name, value in alone.items():
            torch.testing.assert_close(
                value.values, together[name].values[one], rtol=1e-10, atol=1e-12
            )
