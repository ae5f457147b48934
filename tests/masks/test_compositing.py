from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from moe_lora.masks import composite, keep_source


def pictures(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    result = torch.rand(3, 3, 24, 36, generator=generator).to(dtype)
    source = torch.rand(3, 3, 24, 36, generator=generator).to(dtype)
    mask = torch.zeros(3, 1, 24, 36)
    mask[0, :, 8:14, 10:20] = 1
    mask[1] = (torch.rand(1, 24, 36, generator=generator) > 0.99).float()
    return result, source, mask


def distance_to(mask: Tensor) -> np.ndarray:
    """Return the Euclidean distances that scipy finds, infinite for an empty mask."""
    found = [
        ndimage.distance_transform_edt(one[0].numpy() < 0.5)
        if (one >= 0.5).any()
        else np.full(one.shape[1:], np.inf)
        for one in mask
    ]
    return np.stack(found)[:, None]


@pytest.mark.parametrize("feather", [0, 1, 2, 5, 60])
def test_the_weight_follows_the_distance(feather: int) -> None:
    _, _, mask = pictures()
    weight = composite(torch.ones(3, 2, 24, 36), torch.zeros(3, 2, 24, 36), mask, feather)
    nearness = (1 - distance_to(mask) / (feather + 1)).clip(0, 1)
    expected = nearness**2 * (3 - 2 * nearness)
    for channel in range(2):
        np.testing.assert_allclose(weight[:, channel : channel + 1], expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feather", [0, 3])
def test_it_is_exact_on_both_sides_of_the_edge(feather: int, dtype: torch.dtype) -> None:
    result, source, mask = pictures(dtype)
    out = composite(result, source, mask, feather)
    assert out.dtype == dtype
    distance = torch.from_numpy(distance_to(mask)).expand_as(out)
    assert torch.equal(out[distance == 0], result[distance == 0])
    away = distance >= feather + 1
    assert away.any()
    assert torch.equal(out[away], source[away])
    between = (distance > 0) & ~away
    assert bool(between.any()) == (feather > 0)
    low, high = torch.minimum(result, source), torch.maximum(result, source)
    assert ((out >= low) & (out <= high))[between].all()


def test_an_empty_mask_gives_the_source_and_a_full_one_the_result() -> None:
    result, source, mask = pictures()
    assert torch.equal(composite(result, source, torch.zeros_like(mask), 8), source)
    assert torch.equal(composite(result, source, torch.ones_like(mask), 8), result)


def test_what_a_broken_result_holds_outside_does_not_matter() -> None:
    result, source, mask = pictures()
    result = torch.where(torch.from_numpy(distance_to(mask)) >= 3, math.nan, result)
    assert torch.isfinite(composite(result, source, mask, 2)).all()


def test_soft_masks_are_blended_as_they_are() -> None:
    result, source, _ = pictures()
    soft = torch.full((3, 1, 24, 36), 0.25)
    expected = source + 0.25 * (result - source)
    torch.testing.assert_close(composite(result, source, soft, 4), expected)
    torch.testing.assert_close(composite(result, source, soft + 0.5, 0), result * 0.75 + source / 4)


def test_gradients_reach_everything() -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (1, 2, 4, 6)
    inputs = [torch.rand(shape, generator=generator).double().requires_grad_() for _ in range(2)]
    mask = torch.rand(1, 1, 4, 6, generator=generator)
    assert torch.autograd.gradcheck(lambda a, b: composite(a, b, mask, 2), inputs)
    mask.requires_grad_()
    composite(*inputs, mask).sum().backward()
    expected = (inputs[0] - inputs[1]).sum(1, keepdim=True).float()
    torch.testing.assert_close(mask.grad, expected)


def test_a_batch_is_its_samples() -> None:
    result, source, mask = pictures()
    together = composite(result, source, mask, 3)
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.equal(together[one], composite(result[one], source[one], mask[one], 3))


def test_transposing_transposes() -> None:
    result, source, mask = pictures()
    turned = composite(result.mT, source.mT, mask.mT, 4)
    torch.testing.assert_close(turned.mT, composite(result, source, mask, 4))


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"feather": -1}, ValueError, "`feather` to be an integer >= 0, but got -1"),
        ({"feather": 1.5}, ValueError, "`feather`"),
        ({"feather": True}, ValueError, "`feather`"),
        ({"prediction": torch.zeros(2, 3, 24, 36)}, ValueError, "`prediction` to have shape"),
        ({"prediction": torch.zeros(3, 24, 36)}, ValueError, "`prediction` to have shape"),
        ({"source": torch.zeros(3, 1, 24, 36)}, ValueError, "`source` to have the shape"),
        ({"source": torch.zeros(3, 3, 24, 36).double()}, TypeError, "dtype of `prediction`"),
        ({"prediction": torch.zeros(3, 3, 24, 36).byte()}, TypeError, "`prediction` .*uint8"),
        ({"source": None}, TypeError, "`source` .*NoneType"),
        ({"mask": torch.full((3, 1, 24, 36), 255.0)}, ValueError, "divide by 255"),
        ({"mask": torch.zeros(3, 1, 24, 36).bool()}, TypeError, "`mask`"),
    ],
)
def test_bad_input_is_told(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    result, source, mask = pictures()
    given = {"prediction": result, "source": source, "mask": mask, "feather": 0} | changed
    with pytest.raises(error, match=match):
        composite(**given)


def reconstructions() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return predictions, sources, masks, and what an autoencoder makes of both together.

    The prediction differs from the last by noise, and by a patch of the first sample: a shadow
    that went.
    """
    prediction, source, mask = pictures()
    prediction, source = 0.3 + 0.4 * prediction, 0.3 + 0.4 * source
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(2))
    reconstruction = composite(prediction, source, mask) + 0.01 * noise
    prediction = torch.where(mask > 0, prediction, reconstruction + 0.01 * noise.flip(0))
    prediction[0, :, 16:, 10:30] += 0.2
    return prediction, source, mask, reconstruction


def kept_by_loop(
    prediction: Tensor, source: Tensor, mask: Tensor, reconstruction: Tensor, reach: int
) -> Tensor:
    """Compute `keep_source` pixel by pixel, with thresholds of 0.02 and 0.04."""
    change, out = prediction - reconstruction, prediction.clone()
    batch, _, height, width = prediction.shape
    for b in range(batch):
        for r in range(height):
            for c in range(width):
                rows = slice(max(r - reach, 0), r + reach + 1)
                columns = slice(max(c - reach, 0), c + reach + 1)
                amount = change[b, :, rows, columns].abs().mean().item()
                rise = min(max((amount - 0.02) / (0.04 - 0.02), 0), 1)
                weight = rise**2 * (3 - 2 * rise)
                share = mask[b, 0, r, c].item()
                background = source[b, :, r, c] + weight * change[b, :, r, c]
                out[b, :, r, c] = share * prediction[b, :, r, c] + (1 - share) * background
    return out


@pytest.mark.parametrize("window", [1, 5, 7, 71])
def test_the_source_is_kept_by_the_local_change(window: int) -> None:
    prediction, source, mask, reconstruction = reconstructions()
    mask[1] *= 0.25
    found = keep_source(prediction, source, mask, lambda _: reconstruction, window=window)
    expected = kept_by_loop(prediction, source, mask, reconstruction, window // 2)
    torch.testing.assert_close(found, expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_what_the_model_left_alone_is_the_source_to_the_last_bit() -> None:
    prediction, source, mask, reconstruction = reconstructions()
    kept = keep_source(prediction, source, mask, lambda _: reconstruction)
    outside = (mask == 0).expand_as(kept)
    assert torch.equal(kept[1:][outside[1:]], source[1:][outside[1:]])
    assert torch.equal(kept[~outside], prediction[~outside])
    # In the middle of the shadow the whole change is added, 7 // 2 pixels beyond it nothing.
    shadow = (slice(0, 1), slice(None), slice(19, None), slice(13, 27))
    torch.testing.assert_close(kept[shadow], (source + prediction - reconstruction)[shadow])
    assert torch.equal(kept[0, :, :, 34:], source[0, :, :, 34:])


def test_the_reconstruction_is_of_the_composite_and_made_once() -> None:
    prediction, source, mask, _ = reconstructions()
    seen: list[Tensor] = []

    def reconstruct(image: Tensor) -> Tensor:
        seen.append(image)
        return image + 0.3

    kept = keep_source(source + 0.3, source, mask, reconstruct)
    assert len(seen) == 1
    assert torch.equal(seen[0], composite(source + 0.3, source, mask))
    # The prediction is the reconstruction, however far both are from the source.
    outside = (mask == 0).expand_as(kept)
    assert torch.equal(kept[outside], source[outside])
    assert torch.equal(keep_source(prediction, source, mask * 0 + 1, reconstruct), prediction)


def test_thresholds_move_the_change_that_counts() -> None:
    _, source, _, _ = reconstructions()
    nothing = torch.zeros(3, 1, 24, 36)

    def weight(change: float, **options: float) -> float:
        kept = keep_source(source + change, source, nothing, lambda image: image, **options)
        return ((kept - source) / change).mean().item()

    assert weight(0.019) == 0
    assert weight(0.03) == pytest.approx(0.5, abs=1e-4)
    assert weight(0.041) == pytest.approx(1, abs=1e-4)
    assert weight(0.04, high=0.2) == pytest.approx((1 / 9) ** 2 * (3 - 2 / 9), abs=1e-4)
    assert weight(0.04, low=0.05, high=0.06) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_keeping_the_source_in_other_dtypes(dtype: torch.dtype) -> None:
    prediction, source, mask, reconstruction = reconstructions()
    given = [value.to(dtype) for value in (prediction, source, reconstruction)]
    with torch.autocast("cpu", torch.bfloat16):
        kept = keep_source(given[0], given[1], mask, lambda _: given[2])
    assert kept.dtype == dtype
    wide = [value.double() for value in given]
    expected = keep_source(wide[0], wide[1], mask, lambda _: wide[2])
    torch.testing.assert_close(kept.double(), expected, atol=1e-2, rtol=0)
    same = torch.from_numpy(distance_to(mask)).expand_as(kept) > 0
    assert torch.equal(kept[1:][same[1:]], given[1][1:][same[1:]])


def test_keeping_the_source_has_gradients_through_the_reconstruction() -> None:
    generator = torch.Generator().manual_seed(1)
    images = [0.3 + 0.4 * torch.rand(2, 2, 5, 6, generator=generator) for _ in range(2)]
    inputs = [value.double().requires_grad_() for value in images]
    mask = torch.rand(2, 1, 5, 6, generator=generator)
    assert torch.autograd.gradcheck(
        lambda a, b: keep_source(a, b, mask, lambda c: 0.8 * c, high=0.3, window=3), inputs
    )


def test_keeping_the_sources_of_a_batch_is_doing_so_one_by_one() -> None:
    prediction, source, mask, _ = reconstructions()
    together = keep_source(prediction, source, mask, torch.sqrt)
    for index in range(3):
        one = slice(index, index + 1)
        alone = keep_source(prediction[one], source[one], mask[one], torch.sqrt)
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"low": 0.04}, ValueError, "0 <= `low` < `high`, but got 0.04 and 0.04"),
        ({"low": -0.1}, ValueError, "`low`"),
        ({"window": 4}, ValueError, "`window` to be odd, but got 4"),
        ({"window": -1}, ValueError, "`window`"),
        ({"reconstruct": lambda _: torch.zeros(3, 3, 8, 8)}, ValueError, "`reconstruct.image.`"),
        ({"reconstruct": lambda x: x.half()}, TypeError, "`reconstruct.image.` .* dtype"),
        ({"source": torch.zeros(3, 1, 24, 36)}, ValueError, "`source` to have the shape"),
        ({"mask": torch.full((3, 1, 24, 36), 255.0)}, ValueError, "divide by 255"),
    ],
)
def test_bad_input_of_keeping_is_told(
    changed: dict[str, Any], error: type[Exception], match: str
) -> None:
    prediction, source, mask, _ = reconstructions()
    given = {"prediction": prediction, "source": source, "mask": mask, "reconstruct": torch.sqrt}
    with pytest.raises(error, match=match):
        keep_source(**(given | changed))
