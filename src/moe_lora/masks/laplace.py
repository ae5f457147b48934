"""The Laplace equation in a mask: continue images smoothly from its edge."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lora.masks.validation import check_fit, check_mask

TOLERANCE = 1e-4
"""Error at which the iteration stops, relative to the solution, in the energy norm."""

_MAX_ITERATIONS = 1000
"""About 10 are needed at the default tolerance, whatever the size."""

_DAMPING = 0.8
"""Of the Jacobi smoother."""

_OVERCORRECTION = 1.5
"""Factor on the coarse correction: piecewise constant functions are stiff, so it falls short."""


def harmonic_extension(values: Tensor, mask: Tensor, *, tolerance: float = TOLERANCE) -> Tensor:
    """Keep images outside a mask, and continue them harmonically inside.

    u(p) = values(p) where mask(p) = 0, and elsewhere the mean of u over the (up to four) horizontal
    and vertical neighbors of p in the image: the discrete Laplace equation, with `values` along
    the mask's edge as Dirichlet condition and no flux over the border of the image.

    Conjugate gradients solve it, preconditioned by a multigrid cycle, sample by sample and only in
    the mask's bounding box: the number of iterations hardly grows with the size. `values` inside
    the mask are not read.

    Args:
        values: `(B, C, H, W)`, floating point, in any range.
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; every pixel above 0 is filled.
        tolerance: relative error in the energy norm at which the iteration stops, in (0, 1).

    Returns:
        `(B, C, H, W)`, in the dtype of `values`, with gradient to `values`. Zero for a sample whose
        mask is above 0 everywhere: it has no edge.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.
        TypeError: `values` is not floating point.
        ValueError: `values` does not fit the mask, or `tolerance` is not in (0, 1).
        RuntimeError: the iteration does not reach `tolerance`.

    Example:
        >>> values = torch.tensor([[[[0.0, 9.0, 9.0, 3.0]]]])
        >>> harmonic_extension(values, torch.tensor([[[[0.0, 1.0, 1.0, 0.0]]]]))
        tensor([[[[0., 1., 2., 3.]]]])
    """
    unknown = check_mask(mask).detach() > 0
    check_fit(values, unknown, "values")
    if not 0 < tolerance < 1:
        raise ValueError(f"Expected `tolerance` to be in (0, 1), but got {tolerance}.")
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    with torch.autocast(values.device.type, enabled=False):
        pairs = zip(wide.split(1), unknown.split(1), strict=True)
        extended = torch.cat([_extend(image, where, tolerance) for image, where in pairs])
    return extended.to(values.dtype)


def _extend(values: Tensor, unknown: Tensor, tolerance: float) -> Tensor:
    """Extend one sample, `(1, C, H, W)`, into its bool mask, `(1, 1, H, W)`."""
    known = torch.where(unknown, 0, values)
    if not unknown.any() or unknown.all():
        return known
    height, width = unknown.shape[2:]
    top, bottom = _span(unknown.any(dim=3))
    left, right = _span(unknown.any(dim=2))
    inner = unknown[..., top:bottom, left:right]
    # Only values beside the mask count, and a NaN elsewhere must not spread.
    loads = torch.where(inner, _neighbor_sum(known[..., top:bottom, left:right]), 0)
    solution = _solve(loads, _grids(inner, values.dtype), tolerance)
    return known + F.pad(solution, (left, width - right, top, height - bottom))


def _span(occupied: Tensor) -> tuple[int, int]:
    """Return the range of the occupied places and one more on each side where there is one."""
    places = occupied.flatten().nonzero()
    return max(int(places[0]) - 1, 0), min(int(places[-1]) + 2, occupied.numel())


def _neighbor_sum(values: Tensor) -> Tensor:
    padded = F.pad(values, (1, 1, 1, 1))
    rows, columns = padded[..., 1:-1], padded[..., 1:-1, :]
    return rows[..., :-2, :] + rows[..., 2:, :] + columns[..., :-2] + columns[..., 2:]


class _Grid(NamedTuple):
    """The equations of one level, those of a resistor network: the Laplace matrix.

    Attributes:
        right: `(1, 1, h, w - 1)`, conductance between a cell and the next one in its row.
        down: `(1, 1, h - 1, w)`, the same in its column.
        diagonal: `(1, 1, h, w)`, all conductances of a cell, those to known pixels included.
        inverse: of `diagonal`, and 0 where a cell has no unknown pixel.
    """

    right: Tensor
    down: Tensor
    diagonal: Tensor
    inverse: Tensor

    def apply(self, values: Tensor) -> Tensor:
        """Return the matrix times `values`, `(1, C, h, w)`."""
        product = self.diagonal * values
        product[..., :-1].sub_(self.right * values[..., 1:])
        product[..., 1:].sub_(self.right * values[..., :-1])
        product[..., :-1, :].sub_(self.down * values[..., 1:, :])
        product[..., 1:, :].sub_(self.down * values[..., :-1, :])
        return product


def _grids(unknown: Tensor, dtype: torch.dtype) -> list[_Grid]:
    """Build the levels: a coarse cell joins 2 x 2 fine ones, and conductances add up."""
    cells = unknown.to(dtype)
    right = cells[..., :-1] * cells[..., 1:]
    down = cells[..., :-1, :] * cells[..., 1:, :]
    ground = cells * _neighbor_sum(1 - cells)
    grids = []
    while True:
        diagonal = ground + F.pad(right, (1, 0)) + F.pad(right, (0, 1))
        diagonal += F.pad(down, (0, 0, 1, 0)) + F.pad(down, (0, 0, 0, 1))
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
        grids.append(_Grid(right, down, diagonal, inverse))
        height, width = ground.shape[2:]
        if max(height, width) <= 2:
            return grids
        odd_rows, odd_columns = height % 2, width % 2
        across = F.pad(right, (0, 0, 0, odd_rows))[..., 1::2]
        right = across[..., 0::2, :] + across[..., 1::2, :]
        along = F.pad(down, (0, odd_columns))[..., 1::2, :]
        down = along[..., 0::2] + along[..., 1::2]
        ground = _coarsen(ground)


def _coarsen(values: Tensor) -> Tensor:
    """Sum over 2 x 2 cells."""
    height, width = values.shape[2:]
    return 4 * F.avg_pool2d(F.pad(values, (0, width % 2, 0, height % 2)), 2)


def _refine(values: Tensor, fine: Tensor) -> Tensor:
    """Repeat every cell 2 x 2 times, cut to the size of `fine`."""
    repeated = values.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return repeated[..., : fine.shape[2], : fine.shape[3]]


def _multigrid(grids: list[_Grid], loads: Tensor) -> Tensor:
    """Solve roughly: one symmetric V-cycle from zero."""
    grid, coarser = grids[0], grids[1:]
    step = _DAMPING * grid.inverse
    values = step * loads
    if coarser:
        error = _multigrid(coarser, _coarsen(loads - grid.apply(values)))
        correction = _OVERCORRECTION * _refine(error, values)
        values = values + torch.where(grid.inverse > 0, correction, 0)
    return values + step * (loads - grid.apply(values))


class _Solve(torch.autograd.Function):
    """Solve the finest grid's equations. Their matrix is symmetric: so is the gradient found."""

    @staticmethod
    def forward(ctx: Any, loads: Tensor, grids: list[_Grid], tolerance: float) -> Tensor:
        """Run preconditioned conjugate gradients, channel by channel."""
        ctx.grids, ctx.tolerance = grids, tolerance
        residual = torch.where(grids[0].inverse > 0, loads, 0)
        values, direction = torch.zeros_like(residual), torch.zeros_like(residual)
        energy: Tensor | None = None
        enough: Tensor | None = None
        for _ in range(_MAX_ITERATIONS):
            preconditioned = _multigrid(grids, residual)
            before, energy = energy, _dot(residual, preconditioned)
            enough = tolerance**2 * energy if enough is None else enough
            if before is not None and not (energy > enough).any():
                return values
            direction = preconditioned + _ratio(energy, before) * direction
            product = grids[0].apply(direction)
            length = _ratio(energy, _dot(direction, product))
            values, residual = values + length * direction, residual - length * product
        raise RuntimeError(
            f"Expected an error below `tolerance`={tolerance} within {_MAX_ITERATIONS} iterations, "
            "but it is above; raise `tolerance`."
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Solve for the gradient."""
        return _solve(gradients[0], ctx.grids, ctx.tolerance), None, None


def _solve(loads: Tensor, grids: list[_Grid], tolerance: float) -> Tensor:
    """Solve the finest grid's equations, with gradient to `loads`."""
    solution: Tensor = _Solve.apply(loads, grids, tolerance)  # type: ignore[no-untyped-call]  # untyped in torch
    return solution


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((2, 3), keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor | None) -> Tensor | float:
    """Divide; 0 where the denominator is 0 or missing, as for a channel that needs no more."""
    if denominator is None:
        return 0.0
    return torch.where(denominator == 0, 0, numerator / denominator)
