from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moe_lora.routing.weights.alignment import (
    Level,
    align_weights,
    coarsen,
    enlarge,
    level_of,
    weights_by_row,
)

E, D_IN = 3, 6


class TestRows:
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def test_folded_rows_take_the_weights_of_their_sample(self) -> None:
        expected = torch.stack([self.weights[row // 3] for row in range(6)])
        assert torch.equal(weights_by_row(self.weights, 6, "folded"), expected)
        assert torch.equal(weights_by_row(self.weights, 2, "folded"), self.weights)
        with pytest.raises(ValueError, match="for the 5 samples"):
            weights_by_row(self.weights, 5, "folded")
        with pytest.raises(ValueError, match=r"per token of shape \(2, 4, 2\)"):
            weights_by_row(self.weights[:, None].expand(-1, 4, -1), 6, "folded")

    def test_packed_rows_take_one_weight_or_raise(self) -> None:
        with pytest.raises(ValueError, match="weights for 2 samples"):
            weights_by_row(self.weights, 2, "packed")
        assert torch.equal(weights_by_row(self.weights[0], 7, "packed"), self.weights[0])
        assert torch.equal(weights_by_row(self.weights[:1], 7, "packed"), self.weights[0])
        assert torch.equal(weights_by_row(self.weights[:1], 7, "folded"), self.weights[0])

    def test_other_rows_are_samples(self) -> None:
        assert weights_by_row(self.weights, 2) is self.weights
        for rows in (1, 4):
            with pytest.raises(ValueError, match=f"for the {rows} samples"):
                weights_by_row(self.weights, rows)


def test_token_weights_follow_the_stream():
    tokens = torch.rand(2, 4, E)
    mean = tokens.mean(1)
    text = align_weights(tokens, torch.rand(2, 4, D_IN), "text")
    torch.testing.assert_close(text, mean[:, None])
    joint = align_weights(tokens, torch.rand(2, 7, D_IN), "joint")
    torch.testing.assert_close(joint[:, :3], mean[:, None].expand(2, 3, E))
    torch.testing.assert_close(joint[:, 3:], tokens)
    torch.testing.assert_close(align_weights(tokens, torch.rand(2, D_IN), "image"), mean)


def test_weights_that_do_not_fit_raise():
    with pytest.raises(ValueError, match=r"for the 3 samples .* got weights of shape \(2, 3\)"):
        align_weights(torch.rand(2, E), torch.rand(3, 4, D_IN))
    with pytest.raises(ValueError, match=r"for the 5 tokens .* weights for 4 tokens"):
        align_weights(torch.rand(2, 4, E), torch.rand(2, 5, D_IN))


def test_joint_layers_put_the_image_first_where_their_model_does():
    tokens = torch.rand(2, 4, E)
    mean = tokens.mean(1, keepdim=True)
    joint = align_weights(tokens, torch.rand(2, 7, D_IN), "joint_image_first")
    torch.testing.assert_close(joint, torch.cat([tokens, mean.expand(-1, 3, -1)], 1))
    for stream in ("joint", "joint_image_first"):
        assert torch.equal(align_weights(tokens, torch.rand(2, 4, D_IN), stream), tokens)
        with pytest.raises(ValueError, match="for the 3 tokens"):
            align_weights(tokens, torch.rand(2, 3, D_IN), stream)


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
        assert level_of(grid, size) == level
        assert level_of(grid, (size[0] * size[1],)) == level
    counts = {a * b for a, b in levels}
    for tokens in range(0, 4 * rows * columns + 1):
        assert (level_of(grid, (tokens,)) is not None) == (tokens in counts), tokens
    assert level_of((4, 6), (6, 4)) is None
    assert level_of((4, 6), (3, 8)) is None


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
    found = coarsen(weights, grid, 2**halvings)
    expected = [weights[:, owner == cell].mean(1) for cell in range(small[0] * small[1])]
    torch.testing.assert_close(found, torch.stack(expected, 1))
    torch.testing.assert_close(enlarge(found, small, 2**halvings, grid), found[:, owner])
    assert torch.autograd.gradcheck(lambda w: coarsen(w, grid, 2**halvings), weights)


def test_weights_on_a_grid_follow_the_layers_resolution_or_raise():
    weights = torch.rand(1, 24, E)
    small = coarsen(weights, (4, 6), 2)
    assert torch.equal(align_weights(weights, torch.rand(1, 6, D_IN), grid=(4, 6)), small)
    plane = align_weights(weights, torch.rand(1, 2, 3, D_IN), grid=(4, 6))
    assert torch.equal(plane, small.view(1, 2, 3, E))
    same = align_weights(weights, torch.rand(1, 4, 6, D_IN), grid=(4, 6))
    assert torch.equal(same, weights.view(1, 4, 6, E))
    with pytest.raises(ValueError, match=r"7 tokens .* for 24 tokens on a grid of 4 x 6"):
        align_weights(weights, torch.rand(1, 7, D_IN), grid=(4, 6))
    with pytest.raises(ValueError, match="for the 24 tokens"):  # as many, but another picture
        align_weights(weights, torch.rand(1, 6, 4, D_IN), grid=(4, 6))
