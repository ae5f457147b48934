from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve
from torch import Tensor

from moe_lora.masks import harmonic_extension
from moe_lora.masks.laplace import _grids


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_masks() -> Tensor:
    """Return masks of several components: ragged, with holes, over the border, nearly full."""
    mask = torch.zeros(5, 1, 37, 54)
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((37, 54)), 2)
    mask[0, 0] = torch.from_numpy(smooth > 0)
    mask[1, :, 5:20, 8:30] = mask[1, :, 25:30, 40:50] = 1
    mask[1, :, 10:13, 15:18] = 0
    mask[2, :, :22, 30:] = mask[2, :, 30:, :7] = 1
    mask[3] = 1
    mask[3, :, 17, 22] = 0
    mask[4, :, 36, 53] = 1
    return mask


def solved_by_scipy(values: np.ndarray, unknown: np.ndarray) -> np.ndarray:
    """Set up the equation of every pixel one by one, and solve all of them directly."""
    height, width = unknown.shape
    matrix, loads = sparse.lil_matrix((height * width,) * 2), np.zeros(height * width)
    for row in range(height):
        for column in range(width):
            place = row * width + column
            if not unknown[row, column]:
                matrix[place, place], loads[place] = 1, values[row, column]
                continue
            for r, c in (
                (row - 1, column),
                (row + 1, column),
                (row, column - 1),
                (row, column + 1),
            ):
                if 0 <= r < height and 0 <= c < width:
                    matrix[place, place] += 1
                    matrix[place, r * width + c] = -1
    return spsolve(matrix.tocsr(), loads).reshape(height, width)


def test_it_is_what_a_direct_solver_finds() -> None:
    mask = random_masks()
    values = torch.randn(5, 2, 37, 54, generator=rng(), dtype=torch.float64)
    extended = harmonic_extension(values, mask, tolerance=1e-12)
    for sample in range(5):
        for channel in range(2):
            expected = solved_by_scipy(values[sample, channel].numpy(), mask[sample, 0].numpy() > 0)
            np.testing.assert_allclose(extended[sample, channel], expected, atol=1e-9)


def test_the_default_tolerance_is_below_what_eight_bits_show() -> None:
    mask = random_masks()
    values = torch.rand(5, 3, 37, 54, generator=rng())
    exact = harmonic_extension(values.double(), mask, tolerance=1e-12)
    assert (harmonic_extension(values, mask) - exact).abs().max() < 1e-3


def test_linear_functions_stay() -> None:
    row, column = torch.meshgrid(torch.arange(40.0), torch.arange(60.0), indexing="ij")
    linear = (0.1 * row - 0.2 * column + 3)[None, None]
    mask = torch.zeros(1, 1, 40, 60)
    mask[..., 3:30, 5:20] = mask[..., 20:36, 25:59] = 1
    values = torch.where(mask > 0, math.nan, linear)
    torch.testing.assert_close(harmonic_extension(values, mask, tolerance=1e-6), linear)


def test_a_strip_is_a_straight_line_and_one_at_the_border_is_constant() -> None:
    values = torch.zeros(1, 1, 12, 21)
    values[..., 15:], values[..., :5] = 2.0, 1.0
    between, beside = torch.zeros(2, 1, 1, 12, 21)
    between[..., 5:15], beside[..., 15:] = 1, 1
    extended = harmonic_extension(values, between, tolerance=1e-6)
    expected = torch.linspace(1, 2, 12).expand(12, 12)[None, None]
    torch.testing.assert_close(extended[..., 4:16], expected)
    values[..., 14] = 0.75
    torch.testing.assert_close(
        harmonic_extension(values, beside, tolerance=1e-6)[..., 15:],
        torch.full((1, 1, 12, 6), 0.75),
    )


def test_no_mask_keeps_everything_and_a_full_one_leaves_zero() -> None:
    values = torch.rand(2, 3, 8, 9, generator=rng())
    mask = torch.zeros(2, 1, 8, 9)
    mask[1] = 1
    extended = harmonic_extension(values, mask)
    assert torch.equal(extended[0], values[0])
    assert torch.equal(extended[1], torch.zeros(3, 8, 9))


def test_outside_the_mask_nothing_changes_and_inside_nothing_is_read() -> None:
    mask = random_masks() * 0.01  # every value above 0 counts as masked
    values = torch.randn(5, 3, 37, 54, generator=rng())
    extended = harmonic_extension(values, mask)
    assert torch.equal(torch.where(mask > 0, 0, extended), torch.where(mask > 0, 0, values))
    assert torch.equal(harmonic_extension(torch.where(mask > 0, math.nan, values), mask), extended)
    # Between the least and the greatest value of the edge: the maximum principle.
    assert extended.abs().amax() <= values.abs().amax() + 1e-4


def test_only_values_beside_the_mask_count() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 5:9, 6:10] = 1
    values = torch.rand(1, 1, 16, 16, generator=rng())
    broken = values.clone()
    broken[..., 4, 5] = broken[..., 0, 0] = math.nan  # a corner is no neighbor
    inside = mask > 0
    torch.testing.assert_close(
        harmonic_extension(broken, mask)[inside], harmonic_extension(values, mask)[inside]
    )
    broken[..., 4, 6] = math.nan
    assert harmonic_extension(broken, mask)[inside].isnan().any()


def test_a_batch_is_its_samples() -> None:
    mask, values = random_masks(), torch.randn(5, 3, 37, 54, generator=rng())
    together = harmonic_extension(values, mask)
    for index in range(5):
        one = slice(index, index + 1)
        assert torch.equal(together[one], harmonic_extension(values[one], mask[one]))


def test_gradients_are_exact_to_second_order() -> None:
    mask = random_masks()[1:3, :, 18:23, 26:32].contiguous()
    values = torch.randn(2, 1, 5, 6, generator=rng(), dtype=torch.float64, requires_grad=True)

    def extend(values: Tensor) -> Tensor:
        return harmonic_extension(values, mask, tolerance=1e-13)

    assert torch.autograd.gradcheck(extend, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v: extend(v).square(), values, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    mask, values = random_masks(), torch.randn(5, 3, 37, 54, generator=rng()).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        extended = harmonic_extension(values, mask)
    assert extended.dtype == dtype
    assert torch.equal(extended, harmonic_extension(values.float(), mask).to(dtype))


@pytest.mark.parametrize("side", [64, 256])
def test_the_iterations_hardly_grow_with_the_size(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jacobi iterations would need thousands, plain conjugate gradients some hundred at 256."""
    monkeypatch.setattr("moe_lora.masks.laplace._MAX_ITERATIONS", 20)
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 8 : -side // 8, 3:] = 1
    mask[..., side // 2, side // 4 : side // 2] = 0
    harmonic_extension(torch.randn(1, 3, side, side, generator=rng()), mask)


def test_coarse_equations_are_the_fine_ones_for_constant_blocks() -> None:
    """The Galerkin product of the dense matrices, written out."""
    unknown = random_masks()[:1, :, :7, :9] > 0

    def dense(grid: Any) -> Tensor:
        height, width = grid.diagonal.shape[2:]
        unit = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
        return grid.apply(unit).flatten(1)

    fine, coarse = _grids(unknown, torch.float64)[:2]
    blocks = torch.zeros(7, 9, 4, 5, dtype=torch.float64)
    for row in range(7):
        for column in range(9):
            blocks[row, column, row // 2, column // 2] = 1
    blocks = blocks.reshape(63, 20)
    torch.testing.assert_close(dense(coarse), blocks.T @ dense(fine) @ blocks)


def test_what_does_not_converge_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_lora.masks.laplace._MAX_ITERATIONS", 3)
    values = torch.rand(1, 1, 37, 54, generator=rng())
    with pytest.raises(RuntimeError, match=r"below `tolerance`=0.0001 within 3 iterations"):
        harmonic_extension(values, random_masks()[:1])


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"tolerance": 0.0}, ValueError, "`tolerance` to be in .0, 1., but got 0.0"),
        ({"tolerance": 1.0}, ValueError, "`tolerance`"),
        ({"values": torch.zeros(5, 3, 37, 53)}, ValueError, "`values` to have shape"),
        ({"values": torch.zeros(3, 37, 54)}, ValueError, "`values` to have shape"),
        ({"values": torch.zeros(5, 3, 37, 54).int()}, TypeError, "`values` .*int32"),
        ({"values": None}, TypeError, "`values` .*NoneType"),
        ({"mask": torch.full((5, 1, 37, 54), 255.0)}, ValueError, "divide by 255"),
    ],
)
def test_bad_input_is_told(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    given = {"values": torch.zeros(5, 3, 37, 54), "mask": random_masks()} | changed
    with pytest.raises(error, match=match):
        harmonic_extension(**given)
