from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from moe_lora.metrics import psnr, regions, ssim, ssim_map


def test_psnr_is_that_of_scikit_image(images: Any) -> None:
    found = psnr(images.prediction, images.target)
    for index, value in enumerate(found.tolist()):
        target, prediction = images.target[index].double(), images.prediction[index].double()
        expected = peak_signal_noise_ratio(target.numpy(), prediction.numpy(), data_range=1)
        assert value == pytest.approx(expected, rel=1e-9)
    assert found.pixels.tolist() == [40 * 56] * 3


def test_psnr_of_a_region_is_that_of_its_pixels(images: Any) -> None:
    where = regions(images.mask, images.source, images.target)
    for region in where.values():
        found = psnr(images.prediction, images.target, region).tolist()
        for index, value in enumerate(found):
            chosen = region[index, 0].numpy()
            if not chosen.any():
                assert value is None
                continue
            expected = peak_signal_noise_ratio(
                images.target[index].double().numpy()[:, chosen],
                images.prediction[index].double().numpy()[:, chosen],
                data_range=1,
            )
            assert value == pytest.approx(expected, rel=1e-9)


def test_one_pixel_is_a_region(images: Any) -> None:
    region = torch.zeros_like(images.mask, dtype=torch.bool)
    region[:, :, 7, 9] = True
    squares = (images.prediction - images.target)[:, :, 7, 9].double().square().mean(1)
    found = psnr(images.prediction, images.target, region)
    torch.testing.assert_close(found.values, -10 * squares.log10(), rtol=1e-9, atol=0)
    similar = ssim_map(images.prediction, images.target)[:, 0, 7, 9]
    torch.testing.assert_close(ssim(images.prediction, images.target, region).values, similar)


def test_equal_pictures_have_a_finite_psnr_and_a_similarity_of_one(images: Any) -> None:
    assert psnr(images.target, images.target).tolist() == [100.0] * 3
    assert ssim(images.target, images.target).tolist() == pytest.approx([1.0] * 3, abs=1e-12)


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    _, full = structural_similarity(
        first.astype(np.float64),
        second.astype(np.float64),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=0,
        full=True,
    )
    return full.mean(0)


def test_the_similarity_map_is_that_of_scikit_image_up_to_the_border(images: Any) -> None:
    found = ssim_map(images.prediction, images.target)
    assert found.shape == (3, 1, 40, 56)
    for index in range(3):
        expected = similarity(images.prediction[index].numpy(), images.target[index].numpy())
        np.testing.assert_allclose(found[index, 0].numpy(), expected, rtol=1e-9, atol=1e-10)


def test_similarity_of_a_region_is_the_mean_of_the_map(images: Any) -> None:
    for region in regions(images.mask, images.source, images.target).values():
        found = ssim(images.prediction, images.target, region).tolist()
        for index, value in enumerate(found):
            chosen = region[index, 0].numpy()
            expected = similarity(images.prediction[index].numpy(), images.target[index].numpy())
            if chosen.any():
                assert value == pytest.approx(expected[chosen].mean(), rel=1e-9)
            else:
                assert value is None


def test_similarity_of_flat_pictures_is_that_of_their_means() -> None:
    c1 = 0.01**2
    expected = (2 * 0.5 * 0.25 + c1) / (0.5**2 + 0.25**2 + c1)
    first, second = torch.full((1, 1, 7, 5), 0.5), torch.full((1, 1, 7, 5), 0.25)
    assert ssim(first, second).mean() == pytest.approx(expected, rel=1e-12)


def test_a_picture_smaller_than_the_window_is_mirrored_as_often_as_it_takes() -> None:
    first, second = torch.rand(1, 1, 3, 2), torch.rand(1, 1, 3, 2)
    tiled = [torch.cat([image, image.flip(2)], 2).repeat(1, 1, 6, 1) for image in (first, second)]
    tiled = [torch.cat([image, image.flip(3)], 3).repeat(1, 1, 1, 8) for image in tiled]
    inner = ssim_map(*tiled)[..., 12:15, 12:14]
    torch.testing.assert_close(ssim_map(first, second), inner, rtol=1e-10, atol=1e-12)


def test_nothing_is_nan_where_nothing_is(images: Any) -> None:
    nowhere = torch.zeros_like(images.mask, dtype=torch.bool)
    for metric in (psnr, ssim):
        found = metric(images.prediction, images.target, nowhere)
        assert found.values.tolist() == [0.0] * 3
        assert found.tolist() == [None] * 3
        assert found.pixels.tolist() == [0] * 3


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_a_batch_is_its_samples(metric: Any, images: Any) -> None:
    region = images.mask > 0
    together = metric(images.prediction, images.target, region)
    for index in range(3):
        one = slice(index, index + 1)
        alone = metric(images.prediction[one], images.target[one], region[one])
        torch.testing.assert_close(together.values[one], alone.values, rtol=1e-12, atol=1e-12)


def test_half_precision_is_measured_in_double() -> None:
    first, second = torch.full((1, 3, 8, 8), 0.5), torch.full((1, 3, 8, 8), 0.25)
    expected = -20 * math.log10(0.25)
    found = psnr(first.bfloat16(), second.bfloat16())
    assert found.mean() == pytest.approx(expected)
    assert found.values.dtype == torch.float64


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_input_is_told(metric: Any, images: Any) -> None:
    prediction, target = images.prediction, images.target
    with pytest.raises(ValueError, match=r"`target` to have the shape of `prediction`"):
        metric(prediction, target[:2])
    with pytest.raises(
        ValueError, match=r"`prediction` to have values in \[0, 1\], but got .*\[-1, "
    ):
        metric(2 * prediction - 1, target)
    with pytest.raises(ValueError, match=r"`target` to have values in \[0, 1\]"):
        metric(prediction, torch.full_like(target, math.nan))
    with pytest.raises(ValueError, match=r"shape \(B, C, H, W\)"):
        metric(prediction[0], target[0])
    with pytest.raises(TypeError, match=r"`prediction` .*uint8"):
        metric(prediction.byte(), target)
    with pytest.raises(TypeError, match="list"):
        metric([1.0], target)
    with pytest.raises(TypeError, match=r"`region` .*float32"):
        metric(prediction, target, images.mask)
    with pytest.raises(ValueError, match="`region` to have shape"):
        metric(prediction, target, images.mask[:1] > 0)
