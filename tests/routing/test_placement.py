from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_lora.routing.placement import ImageTokens, place_tokens, sample_index


def index(given, latents, **arguments):
    found = sample_index(given, latents, arguments)
    return None if found is None else found.tolist()


NOISE = torch.randn(8, 5, 4)


def test_one_row_serves_all_and_as_many_rows_are_the_samples():
    assert index(3, NOISE[:3]) is None
    assert index(1, NOISE[:3]) == [0, 0, 0]
    with pytest.raises(ValueError, match=r"for the 5 samples of the call .* but got 2"):
        index(2, NOISE[:5])


def test_a_repeated_batch_is_guidance():
    for copies in (2, 3):
        assert index(2, NOISE[:2].repeat(copies, 1, 1)) == [0, 1] * copies


PROMPTS = torch.randn(2, 3, 4)


def test_repeated_text_is_several_images_of_a_prompt():
    text = PROMPTS.repeat_interleave(2, dim=0)
    assert index(2, NOISE[:4], encoder_hidden_states=text) == [0, 0, 1, 1]
    guided = torch.cat([torch.zeros_like(text), text])
    assert index(2, NOISE[:4].repeat(2, 1, 1), encoder_hidden_states=guided) == [0, 0, 1, 1] * 2
    three = PROMPTS.repeat_interleave(3, dim=0)
    assert index(2, NOISE[:6], other=three, mask=None) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("latents", "text"),
    [
        (NOISE[:4], None),  # nothing tells
        (NOISE[:4], PROMPTS[:1].expand(4, -1, -1)),  # every order would do
        (NOISE[:4], torch.randn(4, 3, 4)),  # no order does
        (NOISE[:4], PROMPTS.repeat(2, 1, 1)),  # pairs, say of a preference loss
        (NOISE[:1].expand(4, -1, -1), PROMPTS.repeat_interleave(2, dim=0)),  # the same noise
    ],
)
def test_an_order_that_the_call_does_not_tell_raises(latents, text):
    arguments = {} if text is None else {"encoder_hidden_states": text}
    with pytest.raises(ValueError, match=r"does not tell .* mask\.repeat_interleave\(2, dim=0\)"):
        index(2, latents, **arguments)


def test_tokens_of_a_picture_are_spread_over_frames_and_references():
    weights = torch.rand(2, 4, 3)
    mean = weights.mean(1, keepdim=True)
    where = ImageTokens(11, 2, 2, (2, 2))
    spread = where.spread(weights)
    expected = [mean.expand(-1, 2, -1), weights, weights, mean]
    torch.testing.assert_close(spread, torch.cat(expected, 1))
    torch.testing.assert_close(spread.mean(1), mean[:, 0])
    whole = torch.rand(2, 11, 3)
    assert where.spread(whole) is whole
    with pytest.raises(ValueError, match="8 image tokens of the call, or for all its 11 tokens"):
        where.spread(torch.rand(2, 5, 3))
    hidden = torch.randn(2, 11, 6)
    picture = (hidden[:, 2:6] + hidden[:, 6:10]) / 2
    torch.testing.assert_close(where.one_picture(hidden), picture)


def model_with(name="Model", **config):
    model = type(name, (nn.Module,), {})()
    model.config = SimpleNamespace(**config)
    return model


def test_images_are_cut_into_patches_as_the_config_says():
    weights, latents = torch.rand(1, 24, 3), torch.zeros(1, 4, 4, 6)
    assert place_tokens(weights, latents, {}, model_with()) == (weights, (4, 6))
    for patch in (2, (1, 2, 2)):
        found, grid = place_tokens(weights, latents, {}, model_with(patch_size=patch))
        assert grid == (2, 3)
        expected = weights.view(1, 2, 2, 3, 2, 3).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(found, expected)
        same, grid = place_tokens(expected, latents, {}, model_with(patch_size=patch))
        assert same is expected
        assert grid == (2, 3)
    other = torch.rand(1, 7, 3)
    assert place_tokens(other, latents, {}, model_with(patch_size=2))[0] is other


def test_videos_are_left_alone_where_their_patches_are_not_known():
    weights, latents = torch.rand(1, 24, 3), torch.zeros(1, 4, 2, 4, 6)
    for model in (
        model_with(),
        model_with(patch_size=2),
        model_with("CogVideoXTransformer3DModel", patch_size=2, patch_size_t=1),
    ):
        assert place_tokens(weights, latents, {}, model) == (weights, None)
    found, grid = place_tokens(weights, latents, {}, model_with(patch_size=2, patch_size_t=2))
    assert (found.shape, grid) == ((1, 6, 3), None)
