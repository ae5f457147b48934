from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lora.masks import CropBox, correct_seam, stitch


def mask_of(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Tensor:
    """Draw a mask of rectangles: top, left, bottom, right."""
    mask = torch.zeros(1, 1, *size)
    for top, left, bottom, right in boxes:
        mask[..., top:bottom, left:right] = 1
    return mask


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarge `(h, w)` pixel by pixel; a pixel is a square, and the border is repeated."""
    found = np.empty(size)
    for row, column in np.ndindex(size):
        place = [
            min(max((at + 0.5) * low / high - 0.5, 0), low - 1)
            for at, low, high in zip((row, column), values.shape, size, strict=True)
        ]
        (y, x), (v, u) = (int(p) for p in place), (p % 1 for p in place)
        y1, x1 = min(y + 1, values.shape[0] - 1), min(x + 1, values.shape[1] - 1)
        upper = (1 - u) * values[y, x] + u * values[y, x1]
        found[row, column] = (1 - v) * upper + v * ((1 - u) * values[y1, x] + u * values[y1, x1])
    return found


def continued(values: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Solve the Laplace equation in a mask as a dense system."""
    index = {place: i for i, place in enumerate(zip(*np.nonzero(unknown), strict=True))}
    matrix, load = np.zeros((len(index), len(index))), np.zeros(len(index))
    for (y, x), i in index.items():
        for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= near[0] < values.shape[0] and 0 <= near[1] < values.shape[1]:
                matrix[i, i] += 1
                if near in index:
                    matrix[i, index[near]] -= 1
                else:
                    load[i] += values[near]
    found = values.copy()
    found[unknown] = np.linalg.solve(matrix, load)
    return found


def case() -> tuple[Tensor, Tensor, Tensor, Tensor, CropBox]:
    rng = np.random.default_rng(0)
    box = CropBox(top=5, left=3, height=24, width=33, size=(8, 12))
    source = torch.from_numpy(rng.uniform(0.3, 0.7, (1, 1, 40, 50)))
    reduced = torch.from_numpy(rng.uniform(0.3, 0.7, (1, 1, 8, 12)))
    edited = reduced + torch.from_numpy(rng.uniform(-0.1, 0.1, (1, 1, 8, 12)))
    mask = mask_of((40, 50), (12, 12, 20, 24))
    mask[0, 0, 15, 15] = 0.3
    return source, edited, reduced, mask, box


def cells(inside: np.ndarray, size: tuple[int, int]) -> dict[tuple[int, int], tuple[slice, slice]]:
    """Return what each pixel of a reduced crop covers, even if in part."""
    (height, width), (rows, columns) = inside.shape, size
    return {
        (row, column): (
            slice(row * height // rows, -(-(row + 1) * height // rows)),
            slice(column * width // columns, -(-(column + 1) * width // columns)),
        )
        for row, column in np.ndindex(size)
    }


@pytest.mark.parametrize("strength", [None, 0.5, 1.0])
def test_a_reduced_crop_is_stitched_as_the_formula_says(strength: float | None) -> None:
    source, edited, reduced, mask, box = case()
    mask[..., 12:26, 15:27] = 1  # all of some reduced pixels
    prediction = edited + 0.1 * torch.rand(
        edited.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    inside = box.cut(mask)[0, 0].double().numpy()
    places = cells(inside, box.size)
    touched, filled = np.zeros((2, *box.size), dtype=bool)
    for place, part in places.items():
        touched[place] = bool((inside[part] > 0).any())
        filled[place] = bool((inside[part] == 1).all())
    assert filled.any()
    size = (box.height, box.width)
    change = continued((edited - reduced)[0, 0].numpy(), touched)
    outside = box.cut(source)[0, 0].numpy() + bilinear(change, size)
    fill = edited[0, 0].numpy()
    if strength is not None:
        difference = outside - bilinear(prediction[0, 0].numpy(), size)
        step = np.zeros(box.size)
        for place, part in places.items():
            if not filled[place]:
                step[place] = np.average(difference[part], weights=1 - inside[part])
        fill = fill + strength * touched * continued(step, filled)
    found = stitch(
        source,
        edited,
        reduced,
        mask,
        box,
        prediction=None if strength is None else prediction,
        strength=strength or 0.5,
    )
    merged = inside * bilinear(fill, size) + (1 - inside) * outside
    np.testing.assert_allclose(box.cut(found)[0, 0].numpy(), merged, atol=1e-4)
    untouched = torch.ones(40, 50, dtype=torch.bool)
    box.cut(untouched).fill_(False)
    assert torch.equal(found[0, 0][untouched], source[0, 0][untouched])


def test_a_fill_that_is_too_bright_is_darkened_by_its_share() -> None:
    """The step is the same all along the edge, and so is its continuation."""
    source, mask = torch.full((1, 3, 40, 60), 0.4), mask_of((40, 60), (8, 8, 30, 40))
    box = CropBox(0, 0, 40, 60, (20, 30))
    reduced = torch.full((1, 3, 20, 30), 0.4)
    inside = torch.nn.functional.adaptive_max_pool2d(mask, box.size)
    edited = reduced + 0.2 * inside
    found = stitch(source, edited, reduced, mask, box, prediction=reduced + 0.2, strength=0.75)
    fill = torch.nn.functional.interpolate(0.4 + 0.05 * inside, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(found, torch.where(mask > 0, fill, source), atol=1e-4, rtol=0)


def test_a_crop_that_was_not_reduced_has_its_seam_corrected_as_ever() -> None:
    source, _, _, mask, _ = case()
    box = CropBox(top=5, left=3, height=24, width=33, size=(24, 33))
    prediction = torch.rand(1, 1, 24, 33, dtype=torch.float64)
    edited = torch.where(box.cut(mask) > 0, prediction, box.cut(source))
    found = stitch(source, edited, edited, mask, box, prediction=prediction, strength=0.5)
    expected = correct_seam(edited, prediction, box.cut(mask), strength=0.5)
    assert torch.equal(box.cut(found), expected)
    assert not torch.equal(expected, edited)


def test_outside_the_mask_the_source_stays_to_the_last_bit_where_nothing_was_edited() -> None:
    source, edited, reduced, mask, box = case()
    unchanged = torch.where(torch.rand(1, 1, 8, 12) > 2, edited, reduced)
    unchanged[..., 2:4, 3:7] = edited[..., 2:4, 3:7]
    unchanged[..., 7, 11] = edited[..., 7, 11]  # a shadow in the corner
    found = stitch(source.float(), unchanged.float(), reduced.float(), mask, box)
    part, before = box.cut(found)[0, 0], box.cut(source.float())[0, 0]
    inside = box.cut(mask)[0, 0] > 0
    assert (part != before)[inside].any()
    corner = torch.zeros_like(inside)
    corner[-5:, -5:] = True
    assert torch.equal(part[~inside & ~corner], before[~inside & ~corner])
    assert (part != before)[-2:, -2:].all()


def test_a_crop_that_was_not_reduced_is_put_in_as_it_is() -> None:
    source, _, _, mask, _ = case()
    box = CropBox(top=2, left=7, height=10, width=20, size=(10, 20))
    edited = torch.rand(1, 1, 10, 20, dtype=torch.float64)
    found = stitch(source, edited, torch.zeros_like(edited), mask, box)
    assert torch.equal(box.cut(found), edited)
    assert torch.equal(found[..., :2, :], source[..., :2, :])
    assert torch.equal(found[..., 12:, :], source[..., 12:, :])


def test_the_source_is_left_alone_and_gradients_flow() -> None:
    source, edited, reduced, mask, box = case()
    before = source.clone()
    values = [value.clone().requires_grad_() for value in (source, edited, edited + 0.05)]

    def run(source: Tensor, edited: Tensor, prediction: Tensor) -> Tensor:
        return stitch(source, edited, reduced, mask, box, prediction=prediction)

    assert torch.autograd.gradcheck(run, values, eps=1e-4, atol=1e-3, fast_mode=True)
    assert torch.equal(source.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    source, edited, reduced, mask, box = case()
    found = stitch(source.to(dtype), edited.to(dtype), reduced.to(dtype), mask.to(dtype), box)
    expected = stitch(source, edited, reduced, mask, box)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-2, rtol=0)


def test_shapes_that_do_not_fit_raise() -> None:
    source, edited, reduced, mask, box = case()
    with pytest.raises(ValueError, match="`edited` to have shape"):
        stitch(source, edited[..., 1:], reduced, mask, box)
    with pytest.raises(ValueError, match="`reduced` to have the shape of `edited`"):
        stitch(source, edited, reduced.expand(1, 3, 8, 12), mask, box)
    with pytest.raises(ValueError, match="`prediction` to have shape"):
        stitch(source, edited, reduced, mask, box, prediction=source)
    with pytest.raises(ValueError, match=r"`strength` to be in \[0, 1\], but got 1\.5"):
        stitch(source, edited, reduced, mask, box, strength=1.5)
    with pytest.raises(ValueError, match="`source` to have shape"):
        stitch(source[..., :20], edited, reduced, mask, box)
    with pytest.raises(ValueError, match=r"dtype and channels of `source`, torch\.float64 and 1"):
        stitch(source, edited.float(), reduced.float(), mask, box)
    with pytest.raises(ValueError, match=r"but got torch\.float64 and 2"):
        stitch(source, edited.repeat(1, 2, 1, 1), reduced.repeat(1, 2, 1, 1), mask, box)
