from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from moe_lora.masks import analyze, boundary_band, check_mask, to_latent, to_tokens
from moe_lora.masks.validation import check_image, check_size


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (64, 64), (2, 64, 64), (1, 1, 1, 8, 8)])
def test_wrong_shape_names_the_expected_one(shape: tuple[int, ...]) -> None:
    message = f"Expected `mask` to have shape (B, 1, H, W), but got {shape}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_mask(torch.zeros(shape))


def test_mask_without_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="to have elements"):
        check_mask(torch.zeros(0, 1, 8, 8))


@pytest.mark.parametrize(
    ("mask", "error", "advice"),
    [
        (torch.full((1, 1, 4, 4), 255.0), ValueError, "divide by 255"),
        (torch.full((1, 1, 4, 4), 255, dtype=torch.uint8), TypeError, r"mask.float\(\) / 255"),
        (torch.ones(1, 1, 4, 4, dtype=torch.int64), TypeError, r"or mask.float\(\) for 0/1"),
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), TypeError, r"convert with mask.float\(\)\."),
        (torch.ones(1, 1, 4, 4, dtype=torch.complex64), TypeError, r"mask\.real"),
        (torch.full((1, 1, 4, 4), -1.0), ValueError, r"\(mask \+ 1\) / 2"),
        (torch.full((1, 1, 4, 4), 1.2), ValueError, r"mask\.clamp\(0, 1\)"),
        (torch.full((1, 1, 4, 4), float("inf")), ValueError, r"in \[0, 1\]"),
        ([[1.0]], TypeError, "torch.Tensor, but got list"),
    ],
)
def test_bad_masks_get_advice(mask: object, error: type[Exception], advice: str) -> None:
    with pytest.raises(error, match=advice):
        check_mask(mask)  # type: ignore[arg-type]


def test_one_nan_is_found() -> None:
    mask = torch.zeros(2, 1, 8, 8)
    mask[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="free of NaN"):
        check_mask(mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_passes_and_becomes_float32(dtype: torch.dtype) -> None:
    mask = torch.tensor([0.0, 0.5, 1.0, 1.0], dtype=dtype).view(1, 1, 2, 2)
    checked = check_mask(mask)
    assert checked.dtype == torch.float32
    assert checked.flatten().tolist() == [0.0, 0.5, 1.0, 1.0]


def test_rounding_of_a_resized_mask_passes() -> None:
    check_mask(torch.full((1, 1, 4, 4), 1 + 1e-6))


def test_every_function_checks_its_mask() -> None:
    bad = torch.full((1, 1, 16, 16), 255.0)
    for call in (
        lambda: analyze(bad),
        lambda: boundary_band(bad, 1),
        lambda: to_latent(bad, (2, 2)),
        lambda: to_tokens(bad, (2, 2)),
    ):
        with pytest.raises(ValueError, match="divide by 255"):
            call()


@pytest.mark.parametrize(
    ("image", "error", "advice"),
    [
        (torch.zeros(1, 3, 8, 4), ValueError, r"shape \(1, 3, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4), ValueError, r"shape \(1, 3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), TypeError, r"image.float\(\) / 255"),
        (torch.full((1, 3, 4, 4), -1.0), ValueError, r"\(image \+ 1\) / 2"),
        (torch.full((1, 3, 4, 4), 200.0), ValueError, "divide by 255"),
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, "`image` to be free of NaN"),
        ("image.png", TypeError, "but got str"),
    ],
)
def test_bad_images_get_advice(image: object, error: type[Exception], advice: str) -> None:
    with pytest.raises(error, match=advice):
        check_image(image, torch.zeros(1, 1, 4, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 2), (2,), (2, 2, 2), (2.0, 2), (True, 2), 4, "ab"])
def test_sizes_are_two_positive_integers(size: object) -> None:
    with pytest.raises(ValueError, match="Expected `size` to be two integers >= 1"):
        check_size(size, "size")  # type: ignore[arg-type]


def test_values_are_not_read_under_compile() -> None:
    compiled = torch.compile(check_mask, backend="eager", fullgraph=True)
    assert compiled(torch.full((1, 1, 4, 4), 255.0)).max() == 255


class TestReadingOnce:
    def test_a_mask_that_passed_is_read_again_when_it_changes_in_place(self) -> None:
        mask = torch.zeros(1, 1, 4, 4)
        for function in (check_mask, analyze, lambda m: boundary_band(m, 1)):
            function(mask)
            mask[0, 0, 0, 0] = 2
            with pytest.raises(ValueError, match=r"values in \[0, 2\]"):
                function(mask)
            mask[0, 0, 0, 0] = 0

    def test_a_view_and_a_copy_are_read_by_themselves(self) -> None:
        mask = check_mask(torch.zeros(2, 1, 4, 4))
        for other in (mask.clone(), mask[:1]):
            other[0] = 2
            with pytest.raises(ValueError, match=r"values in"):
                check_mask(other)
        with pytest.raises(ValueError, match=r"values in"):
            check_mask(mask)  # which the view changed

    def test_a_mask_that_fails_fails_again(self) -> None:
        mask = torch.full((1, 1, 4, 4), 3.0)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"values in"):
                check_mask(mask)

    def test_an_analysis_by_hand_is_read(self) -> None:
        info = replace(analyze(torch.zeros(1, 1, 4, 4)), mask=torch.full((1, 1, 4, 4), 2.0))
        for made in (info, info.copy(), info.to("cpu"), info.select(torch.tensor([0]))):
            with pytest.raises(ValueError, match=r"values in"):
                to_tokens(made.mask, (2, 2))

    def test_inference_tensors_are_read_each_time(self) -> None:
        with torch.inference_mode():
            mask = check_mask(torch.zeros(1, 1, 4, 4))
            mask[0] = 2
            with pytest.raises(ValueError, match=r"values in"):
                check_mask(mask)
