from __future__ import annotations

import pytest
import torch
from diffusers import FluxFillPipeline, UNet2DConditionModel
from tiny_models import tiny_flux
from torch.nn import functional as F

from moe_lora import MoELoraConfig, RouterInputs, masks
from moe_lora.routing import SurroundingsRouter, router_supervision_loss
from moe_lora.routing.routers.surroundings import (
    GAIN,
    NOISE,
    SHIFT,
    augment_frames,
    frame_coordinates,
)


def box(top: int, left: int, height: int, width: int, size: tuple[int, int] = (64, 96)):
    mask = torch.zeros(1, 1, *size)
    mask[..., top : top + height, left : left + width] = 1
    return mask


def inputs(mask: torch.Tensor, planes: torch.Tensor, patch_size: int = 1) -> RouterInputs:
    """Return the inputs for latents `(B, C, h, w)`."""
    rows, columns = planes.shape[-2] // patch_size, planes.shape[-1] // patch_size
    if patch_size == 2:
        tokens = FluxFillPipeline._pack_latents(planes, *planes.shape)
    else:
        tokens = planes.flatten(2).mT
    return RouterInputs(tokens, mask_info=masks.analyze(mask), grid_size=(rows, columns))


def test_the_frame_is_a_square_around_the_box_three_times_as_large():
    grid = frame_coordinates(box(20, 10, 4, 12), cells=6)
    x, y = (grid[0, ..., i] + 1 for i in (0, 1))  # pixels, as grid_sample counts them
    expected_x = torch.tensor([16 - 18 + 3 + 6.0 * i for i in range(6)])
    expected_y = torch.tensor([22 - 18 + 3 + 6.0 * i for i in range(6)])
    torch.testing.assert_close(x[0] * 96 / 2, expected_x)
    torch.testing.assert_close(y[:, 0] * 64 / 2, expected_y)
    assert torch.equal(x, x[:1].expand(6, 6))


def test_an_empty_mask_counts_as_a_full_one():
    empty = torch.zeros(1, 1, 8, 12)
    assert torch.equal(frame_coordinates(empty), frame_coordinates(torch.ones_like(empty)))


@pytest.mark.parametrize("patch_size", [1, 2])
def test_frames_show_the_latents_the_mask_and_the_border(patch_size):
    planes = torch.randn(1, 4, 16, 24)
    mask = box(0, 32, 16, 16)
    router = SurroundingsRouter(2, 4 * patch_size**2, patch_size=patch_size)
    seen = router.frames(inputs(mask, planes, patch_size))
    assert seen.shape == (1, 6, 16, 16)
    # The frame has 48 pixels, 16 of them above the image: a cell is 3 pixels.
    assert seen[0, 5, :5].eq(0).all()
    assert seen[0, 5, 6:].eq(1).all()
    assert seen[0, 4, 6:10, 6:10].gt(0.9).all()
    assert seen[0, 4, 12:].eq(0).all()
    # Two samples per side of a cell, 1.5 pixels from each other, between latents 4 pixels apart.
    offsets = torch.tensor([0.75, 2.25])
    x = (16 + 3 * 8 + offsets) / 4 - 0.5
    y = (-16 + 3 * 12 + offsets) / 4 - 0.5
    expected = torch.zeros(4)
    for v in y:
        for u in x:
            i, j = int(v), int(u)
            a, b = v - i, u - j
            rows = planes[0, :, i : i + 2, j : j + 2]
            weights = torch.stack(
                [torch.stack([(1 - a) * (1 - b), (1 - a) * b]), torch.stack([a * (1 - b), a * b])]
            )
            expected += (rows * weights).sum((1, 2)) / 4
    torch.testing.assert_close(seen[0, :4, 12, 8], expected)


def test_position_and_size_of_the_mask_do_not_matter():
    planes = F.avg_pool2d(torch.randn(1, 4, 40, 40), 3, 1, 1)
    moved = torch.roll(planes, (4, 6), (2, 3))
    doubled = F.interpolate(planes, scale_factor=2, mode="bilinear")
    router = SurroundingsRouter(3, 4).eval()
    torch.nn.init.normal_(router.heads[0].weight)
    size = (160, 160)
    found = router(inputs(box(60, 64, 24, 20, size), planes)).logits
    there = router(inputs(box(76, 88, 24, 20, size), moved)).logits
    torch.testing.assert_close(there, found)
    larger = router(inputs(box(120, 128, 48, 40, (320, 320)), doubled)).logits
    torch.testing.assert_close(larger, found, atol=0.1, rtol=0)


@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 3}])
def test_rows_sum_to_one_and_all_parameters_get_gradients(kwargs):
    router = SurroundingsRouter(4, 4, **kwargs).eval()
    decision = router(inputs(box(10, 10, 20, 20), torch.randn(1, 4, 8, 12)))
    layers = (3,) if kwargs else ()
    assert decision.weights.shape == (1, *layers, 4)
    torch.testing.assert_close(decision.weights.sum(-1), torch.ones(1, *layers))
    (decision.logits * torch.randn_like(decision.logits)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in router.parameters())


def test_a_new_expert_learns_and_the_others_keep_their_logits():
    router = SurroundingsRouter(2, 4).eval()
    batch = inputs(box(10, 10, 20, 20), torch.randn(1, 4, 8, 12))
    before = router(batch).logits
    router.add_expert(-4.0)
    logits = router(batch).logits
    assert torch.equal(logits[:, :2], before)
    assert (logits[:, 2] == -4).all()
    router.remove_expert(0)
    assert torch.equal(router(batch).logits, logits[:, 1:])


def test_inpainting_models_give_their_image_without_noise():
    fill = tiny_flux(in_channels=384, out_channels=64)
    unet = UNet2DConditionModel(
        in_channels=9,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        cross_attention_dim=8,
    )
    assert SurroundingsRouter.default_kwargs(fill) == {
        "input_dim": 128,
        "channels": [64, 128],
        "patch_size": 2,
    }
    assert SurroundingsRouter.default_kwargs(unet) == {
        "input_dim": 8,
        "channels": [4, 8],
        "patch_size": 1,
    }
    assert SurroundingsRouter.default_kwargs(fill, {"channels"}) == {
        "input_dim": 128,
        "patch_size": 2,
    }
    assert SurroundingsRouter.default_kwargs(fill, {"input_dim"}) == {}


def test_noise_does_not_change_the_decision_for_flux_fill():
    model = tiny_flux(in_channels=384, out_channels=64)
    model.add_adapter(MoELoraConfig(r=2, router="surroundings", num_experts=2))
    router = next(m for m in model.modules() if isinstance(m, SurroundingsRouter)).eval()
    batch = inputs(box(16, 16, 16, 16, (64, 64)), torch.randn(1, 32, 8, 8), 2)
    changed = batch.hidden_states.clone()
    changed[..., :64] = torch.randn(1, 16, 64)
    other = RouterInputs(changed, mask_info=batch.mask_info, grid_size=(4, 4))
    torch.nn.init.normal_(router.heads[0].weight)
    assert torch.equal(router(batch).logits, router(other).logits)
    assert router(batch).logits.abs().sum() > 0.01


def test_it_learns_what_lies_below_the_mask():
    torch.manual_seed(0)
    label = torch.arange(64) % 2
    planes = torch.randn(64, 2, 16, 16) * 0.3
    mask = torch.cat([box(4 * (i % 5) + 8, 4 * (i % 7), 12, 16, (64, 64)) for i in range(64)])
    rows = F.adaptive_max_pool2d(F.pad(mask, (0, 0, 12, -12)) * (1 - mask), 16)
    planes[:, :1] += rows * (label * 2 - 1).view(-1, 1, 1, 1)
    router = SurroundingsRouter(2, 2)
    optimizer = torch.optim.Adam(router.parameters(), 3e-3)
    for _ in range(40):
        decision = router(inputs(mask[:48], planes[:48]))
        router_supervision_loss(decision.logits, label[:48]).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = router.eval()(inputs(mask[48:], planes[48:])).logits.argmax(-1)
    assert (found == label[48:]).float().mean() >= 0.9


def test_augmentation_has_the_spread_that_it_names():
    torch.manual_seed(0)
    frames = torch.full((4000, 3, 4, 4), 2.0)
    found = augment_frames(frames, 2.0)[:, :1]
    assert torch.equal(augment_frames(frames)[:, 1:], frames[:, 1:])  # mask and image area
    of_samples = found.mean((2, 3)).var()
    expected = (2 * 2 * GAIN) ** 2 + (2 * SHIFT) ** 2 + (2 * NOISE) ** 2 / 16
    torch.testing.assert_close(of_samples, torch.tensor(expected), rtol=0.1, atol=0)
    within = found.var((2, 3)).mean()
    torch.testing.assert_close(within, torch.tensor((2 * NOISE) ** 2), rtol=0.05, atol=0)


def test_half_of_the_frames_are_mirrored_with_their_masks():
    torch.manual_seed(0)
    frames = torch.arange(4.0).expand(1000, 3, 4, 4)
    found = augment_frames(frames, 0.0)
    mirrored = found[:, 0, 0, 0] == 3
    assert 0.4 < mirrored.float().mean() < 0.6
    assert torch.equal(found[mirrored], frames[mirrored].flip(3))
    assert torch.equal(found[~mirrored], frames[~mirrored])


def test_frames_are_augmented_in_training_only():
    batch = inputs(box(10, 10, 20, 20), torch.randn(1, 4, 8, 12))
    router = SurroundingsRouter(2, 4, dropout=0.0)
    torch.nn.init.normal_(router.heads[0].weight)
    trained = [router(batch).logits for _ in range(2)]
    assert not torch.equal(*trained)
    router.eval()
    assert torch.equal(router(batch).logits, router(batch).logits)
    plain = SurroundingsRouter(2, 4, dropout=0.0, augmentation=0.0)
    plain.load_state_dict(router.state_dict())
    assert torch.equal(plain.train()(batch).logits, router(batch).logits)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_experts": 0}, "`num_experts`"),
        ({"channels": [2, 9]}, "`channels`"),
        ({"channels": [3, 3]}, "`channels`"),
        ({"patch_size": 3}, "`patch_size`"),
        ({"hidden_dim": 10}, "`hidden_dim`"),
        ({"augmentation": -1.0}, "`augmentation`"),
    ],
)
def test_arguments_are_checked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SurroundingsRouter(**{"num_experts": 2, "input_dim": 8} | kwargs)


def test_tokens_of_another_width_are_refused():
    with pytest.raises(ValueError, match="input_dim=4"):
        SurroundingsRouter(2, 4)(inputs(box(0, 0, 9, 9), torch.zeros(1, 5, 8, 12)))
