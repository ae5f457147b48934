from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moe_lora.routing.weights.fitting.resampling import Level, downsample, find_level, upsample

E, D_IN = 3, 6

GRIDS = [(8, 12), (7, 10), (5, 1), (1, 1), (6, 6), (9, 13)]


@pytest.mark.parametrize("grid", GRIDS)
def test_levels_are_found_from_tokens_and_from_sizes(grid):
    rows, columns = grid
    levels = {grid: Level(grid)}
    for factor in range(2, 13):
        size = (rows * factor, columns * factor)
        levels[size] = Level(size, 1, factor)
    for shrink in (2, 4, 8, 16):
        size = (math.ceil(rows / shrink), math.ceil(columns / shrink))
        levels.setdefault(size, Level(size, shrink))
    for size, level in levels.items():
        assert find_level(grid, size) == level
        assert find_level(grid, (size[0] * size[1],)) == level
    counts = {a * b for a, b in levels}
    for tokens in range(0, 4 * rows * columns + 1):
        assert (find_level(grid, (tokens,)) is not None) == (tokens in counts), tokens
    assert find_level((4, 6), (6, 4)) is None
    assert find_level((4, 6), (3, 8)) is None


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_a_level_averages_the_cells_that_upsampling_gives_back_to_it(grid, halvings):
    """Models undo a level by nearest upsampling to the sizes before it, one after the other."""
    sizes = [grid]
    for _ in range(halvings):
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))
    small = sizes[-1]
    cells = torch.arange(float(small[0] * small[1])).view(1, 1, *small)
    for size in sizes[-2::-1]:
        cells = F.interpolate(cells, size=size, mode="nearest")
    owner = cells.flatten().long()
    weights = torch.rand(2, len(owner), E, dtype=torch.float64).softmax(-1).requires_grad_()
    found = downsample(weights, grid, 2**halvings)
    expected = [weights[:, owner == cell].mean(1) for cell in range(small[0] * small[1])]
    torch.testing.assert_close(found, torch.stack(expected, 1))
    torch.testing.assert_close(upsample(found, small, 2**halvings, grid), found[:, owner])
    assert torch.autograd.gradcheck(lambda w: downsample(w, grid, 2**halvings), weights)
