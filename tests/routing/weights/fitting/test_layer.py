from __future__ import annotations

import pytest
import torch

from moe_lora.routing.weights.fitting.layer import align_weights, repeat_for_rows
from moe_lora.routing.weights.fitting.resampling import downsample

E, D_IN = 3, 6


class TestRows:
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def test_folded_rows_take_the_weights_of_their_sample(self) -> None:
        expected = torch.stack([self.weights[row // 3] for row in range(6)])
        assert torch.equal(repeat_for_rows(self.weights, 6, "folded"), expected)
        assert torch.equal(repeat_for_rows(self.weights, 2, "folded"), self.weights)
        with pytest.raises(ValueError, match="for the 5 samples"):
            repeat_for_rows(self.weights, 5, "folded")
        with pytest.raises(ValueError, match=r"per token of shape \(2, 4, 2\)"):
            repeat_for_rows(self.weights[:, None].expand(-1, 4, -1), 6, "folded")

    def test_packed_rows_take_one_weight_or_raise(self) -> None:
        with pytest.raises(ValueError, match="weights for 2 samples"):
            repeat_for_rows(self.weights, 2, "packed")
        assert torch.equal(repeat_for_rows(self.weights[0], 7, "packed"), self.weights[0])
        assert torch.equal(repeat_for_rows(self.weights[:1], 7, "packed"), self.weights[0])
        assert torch.equal(repeat_for_rows(self.weights[:1], 7, "folded"), self.weights[0])

    def test_other_rows_are_samples(self) -> None:
        assert repeat_for_rows(self.weights, 2) is self.weights
        for rows in (1, 4):
            with pytest.raises(ValueError, match=f"for the {rows} samples"):
                repeat_for_rows(self.weights, rows)


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


def test_weights_on_a_grid_follow_the_layers_resolution_or_raise():
    weights = torch.rand(1, 24, E)
    small = downsample(weights, (4, 6), 2)
    assert torch.equal(align_weights(weights, torch.rand(1, 6, D_IN), grid=(4, 6)), small)
    plane = align_weights(weights, torch.rand(1, 2, 3, D_IN), grid=(4, 6))
    assert torch.equal(plane, small.view(1, 2, 3, E))
    same = align_weights(weights, torch.rand(1, 4, 6, D_IN), grid=(4, 6))
    assert torch.equal(same, weights.view(1, 4, 6, E))
    with pytest.raises(ValueError, match=r"7 tokens .* for 24 tokens on a grid of 4 x 6"):
        align_weights(weights, torch.rand(1, 7, D_IN), grid=(4, 6))
    with pytest.raises(ValueError, match="for the 24 tokens"):  # as many, but another picture
        align_weights(weights, torch.rand(1, 6, 4, D_IN), grid=(4, 6))
