from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lora.masks import composite, correct_seam, harmonic_extension


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return predictions, sources, and masks: a blob, several at the border, a soft one."""
    generator = torch.Generator().manual_seed(0)
    prediction = (0.4 + 0.2 * torch.rand(3, 3, 24, 36, generator=generator)).to(dtype)
    source = (0.4 + 0.2 * torch.rand(3, 3, 24, 36, generator=generator)).to(dtype)
    mask = torch.zeros(3, 1, 24, 36)
    mask[0, :, 8:14, 10:20] = 1
    mask[1, :, :9, 30:] = mask[1, :, 15:, 3:9] = 1
    mask[2, :, 8:14, 10:20] = torch.rand(6, 10, generator=generator)
    return prediction, source, mask


def test_a_constant_shift_is_taken_out_by_its_share() -> None:
    """A fill that is too bright by 0.1: the harmonic extension of a constant is the constant."""
    _, source, mask = images()
    mask = (mask > 0).float()
    shifted = source + 0.1
    image = composite(shifted, source, mask)
    for strength in (0.0, 0.25, 0.5, 1.0):
        expected = source + 0.1 * (1 - strength) * mask
        found = correct_seam(image, shifted, mask, strength=strength)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_in_full_it_keeps_the_gradients_of_the_prediction() -> None:
    """Poisson's equation: the Laplacian inside is the prediction's, the edge the source's."""
    prediction, source, mask = (value[:1].double() for value in images())
    corrected = correct_seam(composite(prediction, source, mask), prediction, mask, strength=1.0)

    def laplacian(values: Tensor) -> Tensor:
        middle = 4 * values[..., 1:-1, 1:-1]
        rows = values[..., :-2, 1:-1] + values[..., 2:, 1:-1]
        return middle - rows - values[..., 1:-1, :-2] - values[..., 1:-1, 2:]

    inside = (mask[..., 1:-1, 1:-1] > 0).expand(-1, 3, -1, -1)
    torch.testing.assert_close(
        laplacian(corrected)[inside], laplacian(prediction)[inside], atol=1e-3, rtol=0
    )


def test_soft_masks_blend_the_corrected_prediction() -> None:
    prediction, source, mask = images()
    extended = harmonic_extension(source - prediction, mask)
    expected = mask * (prediction + 0.5 * extended) + (1 - mask) * source
    found = correct_seam(composite(prediction, source, mask), prediction, mask)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_outside_the_mask_nothing_changes(dtype: torch.dtype) -> None:
    prediction, source, mask = images(dtype)
    image, broken = composite(prediction, source, mask), prediction.clone()
    broken[:, :, 0, 0] = math.nan
    corrected = correct_seam(image, broken, mask)
    assert corrected.dtype == dtype
    outside = (mask == 0).expand_as(image)
    assert torch.equal(corrected[outside], image[outside])
    assert not torch.equal(corrected, image)
    assert torch.isfinite(corrected).all()


def test_empty_and_full_masks_have_no_seam() -> None:
    prediction, source, mask = images()
    assert torch.equal(correct_seam(source, prediction, torch.zeros_like(mask)), source)
    assert torch.equal(correct_seam(prediction, prediction, torch.ones_like(mask)), prediction)


def test_it_stays_in_range_and_gradients_reach_everything() -> None:
    prediction, source, mask = images(torch.float64)
    bright = correct_seam(composite(0 * prediction, source, mask), 0 * prediction, mask)
    assert bright.min() >= 0
    dark = composite(prediction + 0.4, source, mask)
    assert correct_seam(dark, prediction, mask, strength=1.0).max() <= 1
    given = [value[:1, :1, 6:12, 8:13].requires_grad_() for value in (source, prediction)]
    where = mask[:1, :, 6:12, 8:13]
    # The solver's tolerance is that of images, not of finite differences.
    assert torch.autograd.gradcheck(
        lambda a, b: correct_seam(a, b, where), given, eps=1e-3, atol=1e-3, fast_mode=True
    )
    soft = mask[2:].clone().requires_grad_()
    correct_seam(source[2:], prediction[2:], soft).sum().backward()
    assert soft.grad is not None
    assert soft.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"strength": -0.1}, ValueError, "`strength` to be in .0, 1., but got -0.1"),
        ({"strength": 1.5}, ValueError, "`strength`"),
        ({"image": torch.zeros(2, 3, 24, 36)}, ValueError, "`image` to have shape"),
        ({"prediction": torch.zeros(3, 1, 24, 36)}, ValueError, "`prediction` .* shape of `image`"),
        ({"prediction": torch.zeros(3, 3, 24, 36).half()}, TypeError, "dtype of `image`"),
        ({"mask": torch.full((3, 1, 24, 36), 255.0)}, ValueError, "divide by 255"),
    ],
)
def test_bad_input_is_told(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    prediction, source, mask = images()
    with pytest.raises(error, match=match):
        correct_seam(**({"image": source, "prediction": prediction, "mask": mask} | changed))
