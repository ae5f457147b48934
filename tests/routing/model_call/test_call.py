from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_lora.families import visual_channels
from moe_lora.masks import analyze
from moe_lora.routing.inputs import GivenInputs
from moe_lora.routing.model_call import ModelCall


def read_inputs(model, arguments, **given):
    return ModelCall(model, arguments).router_inputs(GivenInputs(**given))


class Model(nn.Module):
    def forward(self, hidden_states=None, timestep=None, img_ids=None, *, sample=None, **extra):
        return hidden_states


def named(name, **config):
    """Return a model of a class with the name of a library's class."""
    model = type(name, (Model,), {})()
    model.config = SimpleNamespace(**config)
    return model


def fill():
    return named("FluxTransformer2DModel", in_channels=384)


def grid(rows, columns):
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None]
    return ids.view(-1, 3)


def fill_tokens(mask, channels=128):
    """Pack a mask as the pipeline does: 8 x 8 pixels to channels, then 2 x 2 latents to a token."""
    from diffusers import FluxFillPipeline

    batch, _, height, width = mask.shape
    h, w = height // 8, width // 8
    unshuffled = mask[:, 0].view(batch, h, 8, w, 8).permute(0, 2, 4, 1, 3).reshape(batch, 64, h, w)
    packed = FluxFillPipeline._pack_latents(unshuffled, batch, 64, h, w)
    return torch.cat([torch.randn(batch, packed.shape[1], channels), packed], dim=-1)


def test_arguments_are_found_by_name_however_they_are_given():
    call = ModelCall.read(Model(), (1, 2), {"sample": 3, "more": 4})
    assert call.arguments == {"hidden_states": 1, "timestep": 2, "sample": 3, "more": 4}


def test_flux_fill_inputs_give_their_mask_exactly_and_the_visual_channels():
    mask = (torch.rand(2, 1, 64, 96) > 0.5).float()
    hidden = fill_tokens(mask)
    inputs = read_inputs(
        fill(),
        {"hidden_states": hidden, "img_ids": grid(4, 6), "timestep": torch.tensor([0.1, 0.2])},
    )
    assert torch.equal(inputs.mask_info.mask, mask)
    assert torch.equal(inputs.hidden_states, hidden[..., :128])
    assert inputs.grid_size == (4, 6)
    assert inputs.timestep.tolist() == pytest.approx([0.1, 0.2])


def test_an_inpainting_unet_gives_its_mask_channel():
    sample = torch.randn(2, 9, 8, 12)
    sample[:, 4] = (torch.rand(2, 8, 12) > 0.5).float()
    inputs = read_inputs(
        named("UNet2DConditionModel", in_channels=9), {"sample": sample, "timestep": 7}
    )
    assert torch.equal(inputs.mask_info.mask, sample[:, 4:5])
    assert inputs.hidden_states.shape == (2, 96, 8)
    assert torch.equal(inputs.hidden_states[0, 13], sample[0, [0, 1, 2, 3, 5, 6, 7, 8], 1, 1])
    assert inputs.grid_size == (8, 12)
    assert inputs.timestep.tolist() == [7, 7]


def test_given_inputs_override_those_of_the_call():
    given = analyze(torch.ones(1, 1, 64, 96))
    hidden = fill_tokens(torch.zeros(2, 1, 64, 96))
    inputs = read_inputs(fill(), {"hidden_states": hidden, "img_ids": grid(4, 6)}, mask_info=given)
    assert inputs.mask_info.area_ratio.tolist() == [1.0, 1.0]


def test_other_models_give_tokens_without_a_mask():
    inputs = read_inputs(Model(), {"hidden_states": torch.randn(2, 5, 7)})
    assert inputs.mask_info is None
    assert inputs.grid_size is None
    assert read_inputs(Model(), {"x": torch.randn(2, 7)}).hidden_states.shape == (2, 1, 7)


def test_contradictions_raise():
    hidden = fill_tokens(torch.zeros(1, 1, 64, 96))
    with pytest.raises(ValueError, match=r"`img_ids` to number the 24 .* 4 rows of 5"):
        read_inputs(fill(), {"hidden_states": hidden, "img_ids": grid(4, 5)})
    with pytest.raises(ValueError, match=r"grid_size=\(rows, columns\)"):
        read_inputs(fill(), {"hidden_states": hidden})
    with pytest.raises(ValueError, match=r"mask, .* for the 2 samples .* got 3"):
        read_inputs(
            Model(),
            {"hidden_states": torch.randn(2, 5, 7)},
            mask_info=analyze(torch.ones(3, 1, 16, 16)),
        )
    with pytest.raises(ValueError, match="floating-point tensor"):
        read_inputs(Model(), {"hidden_states": torch.zeros(2, 3, dtype=torch.long)})


def test_visual_channels_leave_the_mask_out():
    models = fill(), named("UNet2DConditionModel", in_channels=9), named("Mine", in_channels=64)
    assert [visual_channels(model) for model in models] == [128, 8, 64]
    assert visual_channels(Model()) is None


@pytest.mark.parametrize("channels", [9, 384])
def test_an_unknown_family_carries_no_mask(channels):
    model = named("Mine", in_channels=channels)
    assert visual_channels(model) == channels
    sample = torch.rand(2, channels, 4, 6)
    inputs = read_inputs(model, {"sample": sample})
    assert inputs.mask_info is None
    assert inputs.hidden_states.shape == (2, 24, channels)


def test_videos_are_averaged_over_their_frames_wherever_those_are():
    video = torch.randn(2, 3, 4, 5, 6)
    wan = read_inputs(named("Wan"), {"hidden_states": video})
    assert wan.grid_size == (5, 6)
    assert torch.equal(wan.hidden_states[1, 7], video[1, :, :, 1, 1].mean(1))
    cog = read_inputs(named("CogVideoXTransformer3DModel"), {"hidden_states": video})
    torch.testing.assert_close(cog.hidden_states[1, 7], video[1, :, :, 1, 1].mean(0))
    kandinsky = read_inputs(named("Kandinsky5Transformer3DModel"), {"hidden_states": video})
    assert kandinsky.grid_size == (4, 5)
    torch.testing.assert_close(kandinsky.hidden_states[1, 6], video[1, :, 1, 1].mean(0))


def test_a_list_of_samples_is_read_by_its_last_images():
    x = [torch.randn(4, 1, 2, 3) for _ in range(2)]
    inputs = read_inputs(named("ZImageTransformer2DModel"), {"x": x, "t": torch.tensor([0.1, 0.9])})
    assert torch.equal(inputs.hidden_states, torch.stack(x).flatten(2).transpose(1, 2))
    assert inputs.grid_size == (2, 3)
    assert inputs.timestep.tolist() == pytest.approx([0.1, 0.9])
    references = [[torch.randn(4, 1, 6, 6), sample] for sample in x]
    again = read_inputs(Model(), {"x": references})
    assert torch.equal(again.hidden_states, inputs.hidden_states)
    with pytest.raises(
        ValueError, match=r"samples of one size .* \[\(4, 1, 2, 3\), \(4, 1, 4, 4\)"
    ):
        read_inputs(Model(), {"x": [x[0], torch.randn(4, 1, 4, 4)]})


@pytest.mark.parametrize("batched", [False, True])
def test_references_after_numbered_tokens_are_left_out(batched):
    hidden = torch.randn(2, 12, 5)
    reference = grid(2, 3)
    reference[:, 0] = 1
    ids = torch.cat([grid(2, 3), reference])
    inputs = read_inputs(
        Model(), {"hidden_states": hidden, "img_ids": ids.expand(2, -1, -1) if batched else ids}
    )
    assert torch.equal(inputs.hidden_states, hidden[:, :6])
    assert inputs.grid_size == (2, 3)


def test_references_of_qwen_image_are_left_out():
    hidden = torch.randn(2, 10, 5)
    shapes = [[(1, 2, 3), (1, 2, 2)]] * 2
    inputs = read_inputs(Model(), {"hidden_states": hidden, "img_shapes": shapes})
    assert torch.equal(inputs.hidden_states, hidden[:, :6])
    assert inputs.grid_size == (2, 3)
    last = read_inputs(
        named("QwenImage21Transformer2DModel"), {"hidden_states": hidden, "img_shapes": shapes}
    )
    assert torch.equal(last.hidden_states, hidden[:, 6:])
    assert last.grid_size == (2, 2)
    one = read_inputs(Model(), {"hidden_states": hidden, "img_shapes": (1, 2, 5)})
    assert one.grid_size == (2, 5)
    with pytest.raises(ValueError, match="images of one size"):
        read_inputs(Model(), {"hidden_states": hidden, "img_shapes": [[(1, 2, 3)], [(1, 3, 2)]]})
    with pytest.raises(ValueError, match=r"1 \* 4 \* 3 image tokens .* got 10"):
        read_inputs(Model(), {"hidden_states": hidden, "img_shapes": [[(1, 4, 3)]] * 2})


def test_packed_video_tokens_are_averaged_over_their_frames():
    hidden = torch.randn(2, 12, 5)
    inputs = read_inputs(
        Model(), {"hidden_states": hidden, "num_frames": 2, "height": 2, "width": 3}
    )
    torch.testing.assert_close(inputs.hidden_states, (hidden[:, :6] + hidden[:, 6:]) / 2)
    assert inputs.grid_size == (2, 3)


def test_channels_come_last_whatever_the_call_has():
    sound = torch.randn(2, 4, 6)
    inputs = read_inputs(named("Sound", io_channels=4), {"hidden_states": sound})
    assert torch.equal(inputs.hidden_states, sound.transpose(1, 2))
    patches = torch.randn(2, 6, 4, 1, 2, 2)
    inputs = read_inputs(named("Patches", in_channels=4), {"hidden_states": patches})
    assert torch.equal(inputs.hidden_states, patches.flatten(2))
    assert visual_channels(named("Sound", io_channels=4)) == 4


def test_the_timestep_is_found_under_other_names_and_per_token():
    hidden = torch.randn(2, 3, 4)
    for name in ("timesteps", "t", "timestep_ratio"):
        inputs = read_inputs(Model(), {"hidden_states": hidden, name: torch.tensor([3, 5])})
        assert inputs.timestep.tolist() == [3, 5]
    per_token = torch.tensor([[0, 4, 4], [0, 7, 7]])
    inputs = read_inputs(Model(), {"hidden_states": hidden, "timestep": per_token})
    assert inputs.timestep.tolist() == [4, 7]
