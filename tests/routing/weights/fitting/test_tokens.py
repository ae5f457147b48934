from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_lora.routing.model_call import ModelCall
from moe_lora.routing.model_call.image_tokens import ImageTokens
from moe_lora.routing.weights.fitting import fit_to_tokens


def test_tokens_of_a_picture_are_spread_over_frames_and_references():
    weights = torch.rand(2, 4, 3)
    mean = weights.mean(1, keepdim=True)
    where = ImageTokens(11, 2, 2, (2, 2))
    spread = where.expand_weights(weights)
    expected = [mean.expand(-1, 2, -1), weights, weights, mean]
    torch.testing.assert_close(spread, torch.cat(expected, 1))
    torch.testing.assert_close(spread.mean(1), mean[:, 0])
    whole = torch.rand(2, 11, 3)
    assert where.expand_weights(whole) is whole
    with pytest.raises(ValueError, match="8 image tokens of the call, or for all its 11 tokens"):
        where.expand_weights(torch.rand(2, 5, 3))
    hidden = torch.randn(2, 11, 6)
    picture = (hidden[:, 2:6] + hidden[:, 6:10]) / 2
    torch.testing.assert_close(where.average_frames(hidden), picture)


def place_tokens(weights, latents, model):
    return fit_to_tokens(weights, ModelCall(model, {"sample": latents}))


def model_with(name="Model", **config):
    model = type(name, (nn.Module,), {})()
    model.config = SimpleNamespace(**config)
    return model


def test_images_are_cut_into_patches_as_the_config_says():
    weights, latents = torch.rand(1, 24, 3), torch.zeros(1, 4, 4, 6)
    assert place_tokens(weights, latents, model_with()) == (weights, (4, 6))
    for patch in (2, (1, 2, 2)):
        found, grid = place_tokens(weights, latents, model_with(patch_size=patch))
        assert grid == (2, 3)
        expected = weights.view(1, 2, 2, 3, 2, 3).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(found, expected)
        same, grid = place_tokens(expected, latents, model_with(patch_size=patch))
        assert same is expected
        assert grid == (2, 3)
    other = torch.rand(1, 7, 3)
    assert place_tokens(other, latents, model_with(patch_size=2))[0] is other


def test_videos_are_left_alone_where_their_patches_are_not_known():
    weights, latents = torch.rand(1, 24, 3), torch.zeros(1, 4, 2, 4, 6)
    for model in (
        model_with(),
        model_with(patch_size=2),
        model_with("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=1),
    ):
        assert place_tokens(weights, latents, model) == (weights, None)
    found, grid = place_tokens(weights, latents, model_with(patch_size=2, patch_size_t=2))
    assert (found.shape, grid) == ((1, 6, 3), None)
