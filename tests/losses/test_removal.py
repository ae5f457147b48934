from __future__ import annotations

import pytest
import torch
from tiny_models import two_block_vae
from torch import Tensor

from moe_lora.flow import interpolate, pack_latents, unpack_latents, velocity_to_x0
from moe_lora.losses import (
    LatentDecoder,
    RemovalLoss,
    base_loss,
    boundary_loss,
    consistency_loss,
    detail_loss,
    removal,
)

SPECIALIZED = ["boundary", "consistency", "detail"]
OFF: dict[str, float | None] = {"base": 0, "boundary": 0, "consistency": None, "detail": None}


def upsampled(latents: Tensor) -> Tensor:
    """A decoder that is linear: two pixels a latent, three of its channels as colors."""
    return latents[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) / 4 + 0.5


def never(latents: Tensor) -> Tensor:
    raise AssertionError("decoded")


def inputs(
    batch: int = 3, height: int = 4, width: int = 6, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 4, height, width)
    x0, noise, velocity = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    sigma = torch.linspace(0.1, 0.5, batch, dtype=torch.float64)
    mask = torch.zeros(batch, 1, 2 * height, 2 * width, dtype=torch.float64)
    mask[..., 2:5, 3:7] = 1
    target = torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    tensors = {
        "velocity": velocity,
        "target_velocity": noise - x0,
        "x_t": interpolate(x0, noise, sigma),
        "sigma": sigma,
        "mask": mask,
        "target": target.expand(-1, 3, -1, -1).contiguous(),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def only(name: str, weight: float = 1.0) -> dict[str, float | None]:
    return {**OFF, name: weight}


def test_the_total_is_the_weighted_sum_of_the_four_functions() -> None:
    given = inputs()
    image = upsampled(velocity_to_x0(given["x_t"], given["velocity"], given["sigma"]))
    pixels = (image, given["target"], given["mask"])
    expected = {
        "base": base_loss(given["velocity"], given["target_velocity"]),
        "boundary": boundary_loss(*pixels),
        "consistency": consistency_loss(*pixels),
        "detail": detail_loss(*pixels),
    }
    total, components = RemovalLoss(decoder=upsampled)(**given)
    assert list(components) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(components[name], value)
    weights = {"base": 1.0, "boundary": 0.3, "consistency": 0.5, "detail": 0.2}
    torch.testing.assert_close(total, sum(weights[n] * expected[n] for n in weights))


@pytest.mark.parametrize("weight", [0, 0.0, None])
def test_switched_off_pixel_losses_decode_nothing_and_need_nothing(weight: float | None) -> None:
    loss = RemovalLoss(boundary=weight, consistency=weight, detail=weight, decoder=never)
    given = inputs()
    total, components = loss(given["velocity"], given["target_velocity"])
    assert list(components) == ["base"]
    assert torch.equal(total, components["base"].to(total.dtype))
    assert loss.enabled == ("base",)
    assert not loss.specialized


@pytest.mark.parametrize("name", ["base", *SPECIALIZED])
def test_a_switched_off_component_is_not_computed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, f"{name}_loss", lambda *args, **kwargs: never(args[0]))
    _, components = RemovalLoss(**{name: 0}, decoder=upsampled)(**inputs())
    assert name not in components
    assert len(components) == 3
    with pytest.raises(AssertionError, match="decoded"):
        RemovalLoss(decoder=upsampled)(**inputs())


@pytest.mark.parametrize("name", SPECIALIZED)
def test_specialized_tells_losses_that_need_routing(name: str) -> None:
    assert RemovalLoss(**only(name)).specialized
    assert RemovalLoss(**only(name)).enabled == (name,)
    assert not RemovalLoss(**only("base")).specialized
    assert RemovalLoss().enabled == ("base", *SPECIALIZED)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SPECIALIZED)
def test_each_specialized_loss_alone_moves_every_sample_through_the_vae(
    name: str, packed: bool, checkpoint: bool
) -> None:
    given = inputs(dtype=torch.bfloat16)
    if packed:
        given |= {n: pack_latents(given[n]) for n in ("velocity", "target_velocity", "x_t")}
    given["velocity"].requires_grad_()
    loss = RemovalLoss(**only(name), decoder=LatentDecoder(two_block_vae(), checkpoint=checkpoint))
    total, _ = loss(**given, height=4, width=6)
    total.backward()
    gradient = given["velocity"].grad
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1) != 0).any(dim=1).all())


def test_zero_at_the_optimum() -> None:
    given = inputs()
    given["velocity"] = given["target_velocity"].clone().requires_grad_()
    x0 = velocity_to_x0(given["x_t"], given["velocity"], given["sigma"])
    given["target"] = upsampled(x0.detach()).clamp(0, 1)
    loss = RemovalLoss(decoder=lambda latents: upsampled(latents).clamp(0, 1))
    total, components = loss(**given)
    assert total.item() == 0.0
    assert all(value.item() == 0.0 for value in components.values())


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_gradcheck(weighting: str) -> None:
    given = inputs(batch=2, height=2, width=4)
    velocity = given.pop("velocity").requires_grad_()
    loss = RemovalLoss(decoder=upsampled, weighting=weighting, max_sigma=0.4)
    assert torch.autograd.gradcheck(lambda v: loss(v, **given).total, velocity)


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 8), (16, 6), (2, 10)])
def test_packed_latents_give_what_unpacked_ones_do(height: int, width: int) -> None:
    given = inputs(height=height, width=width)
    given["mask"][:] = 0
    given["mask"][..., 1:3, 2:5] = 1
    loss = RemovalLoss(decoder=upsampled)
    unpacked = loss(**given, height=height, width=width)
    given |= {name: pack_latents(given[name]) for name in ("velocity", "target_velocity", "x_t")}
    packed = loss(**given, height=height, width=width)
    assert unpacked.components["consistency"].item() > 0
    for name, value in unpacked.components.items():
        torch.testing.assert_close(packed.components[name], value)


def test_the_gate_decodes_only_samples_of_low_sigma_and_averages_over_them() -> None:
    given = inputs(batch=4)
    given["sigma"] = torch.tensor([0.9, 0.5, 0.71, 0.7], dtype=torch.float64)
    decoded: list[int] = []

    def decoder(latents: Tensor) -> Tensor:
        decoded.append(latents.shape[0])
        return upsampled(latents)

    loss = RemovalLoss(decoder=decoder, max_sigma=0.7)
    _, components = loss(**given)
    assert decoded == [2]
    alone = [
        loss(**{name: tensor[b : b + 1] for name, tensor in given.items()}).components
        for b in (1, 3)
    ]
    for name in SPECIALIZED:
        torch.testing.assert_close(components[name], (alone[0][name] + alone[1][name]) / 2)
    torch.testing.assert_close(
        components["base"], base_loss(given["velocity"], given["target_velocity"])
    )


def test_a_batch_at_high_sigma_decodes_nothing_and_keeps_a_graph() -> None:
    given = inputs(dtype=torch.float32)
    given["sigma"] = torch.full((3,), 0.95)
    given["velocity"].requires_grad_()
    total, components = RemovalLoss(base=0, decoder=never)(**given)
    assert list(components) == SPECIALIZED
    assert total.item() == 0.0
    total.backward()
    assert torch.equal(given["velocity"].grad, torch.zeros_like(given["velocity"]))


def test_a_gated_sample_gets_no_gradient_and_cannot_spoil_the_others() -> None:
    given = inputs(batch=2)
    given["sigma"] = torch.tensor([0.3, 1.0], dtype=torch.float64)
    given["x_t"][1] = float("nan")
    given["velocity"].requires_grad_()
    total, _ = RemovalLoss(base=0, decoder=upsampled)(**given)
    total.backward()
    assert bool(total.isfinite())
    assert bool((given["velocity"].grad[0] != 0).any())
    assert torch.equal(given["velocity"].grad[1], torch.zeros_like(given["velocity"].grad[1]))


def test_a_gate_of_one_lets_every_sample_pass() -> None:
    given = inputs()
    given["sigma"] = torch.tensor([0.2, 0.9, 1.0], dtype=torch.float64)
    image = upsampled(velocity_to_x0(given["x_t"], given["velocity"], given["sigma"]))
    _, components = RemovalLoss(decoder=upsampled, max_sigma=1.0)(**given)
    torch.testing.assert_close(
        components["detail"], detail_loss(image, given["target"], given["mask"])
    )


def test_every_option_changes_the_result() -> None:
    given = inputs()
    plain = RemovalLoss(decoder=upsampled)(**given).components
    weighted = RemovalLoss(decoder=upsampled, weighting="cosmap")(**given).components
    torch.testing.assert_close(
        weighted["base"],
        base_loss(
            given["velocity"], given["target_velocity"], sigma=given["sigma"], weighting="cosmap"
        ),
    )
    assert not torch.equal(weighted["base"], plain["base"])
    wide = RemovalLoss(decoder=upsampled, boundary_width=1)(**given).components
    assert not torch.equal(wide["boundary"], plain["boundary"])
    assert torch.equal(wide["detail"], plain["detail"])
    relaxed = RemovalLoss(decoder=upsampled, effect_band=4)(**given).components
    image = upsampled(velocity_to_x0(given["x_t"], given["velocity"], given["sigma"]))
    torch.testing.assert_close(
        relaxed["consistency"],
        consistency_loss(image, given["target"], given["mask"], effect_band=4),
    )
    assert not torch.equal(relaxed["consistency"], plain["consistency"])
    assert torch.equal(relaxed["boundary"], plain["boundary"])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_window_margin_keeps_the_values_and_limits_the_gradient(
    packed: bool, checkpoint: bool
) -> None:
    given = inputs(batch=2, height=8, width=12, dtype=torch.float32)
    given["mask"][:] = 0
    given["mask"][0, :, 4:6, 4:8] = 1  # latents 2 to 3 and 2 to 4
    given["mask"][1, :, 15, 23] = 1
    latents = given["velocity"].shape
    if packed:
        given |= {n: pack_latents(given[n]) for n in ("velocity", "target_velocity", "x_t")}
    given["velocity"].requires_grad_()
    decoder = LatentDecoder(two_block_vae(), checkpoint=checkpoint)
    whole = RemovalLoss(base=0, decoder=decoder)(**given, height=8, width=12)
    part = RemovalLoss(base=0, decoder=decoder, window_margin=1)(**given, height=8, width=12)
    for name, value in whole.components.items():
        torch.testing.assert_close(part.components[name], value, rtol=1e-4, atol=1e-6)
    part.total.backward()
    reached = given["velocity"].grad
    reached = (unpack_latents(reached, 8, 12) if packed else reached).ne(0).any(1)
    expected = torch.zeros(latents[0], *latents[2:], dtype=torch.bool)
    expected[0, 0:5, 0:6] = True  # the mask's latents, the margin and a context of one
    expected[1, 5:8, 9:12] = True
    assert torch.equal(reached, expected)


def test_masks_that_are_empty_give_a_graph_in_windows_too() -> None:
    given = inputs(dtype=torch.float32)
    given["mask"][:] = 0
    given["velocity"].requires_grad_()
    total, _ = RemovalLoss(base=0, decoder=LatentDecoder(two_block_vae()), window_margin=1)(**given)
    total.backward()
    assert torch.equal(given["velocity"].grad, torch.zeros_like(given["velocity"]))


def test_a_decoder_without_windows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a method `in_windows\(latents, windows\)`"):
        RemovalLoss(decoder=upsampled, window_margin=2)(**inputs())


def test_specialized_losses_at_every_nth_step_have_n_times_the_weight() -> None:
    given = inputs()
    every = RemovalLoss(decoder=upsampled)(**given)
    loss = RemovalLoss(decoder=upsampled, specialized_every=3)
    totals = []
    for step in range(6):
        total, components = loss(**given, step=step)
        assert list(components) == (list(every.components) if step % 3 == 0 else ["base"])
        assert all(torch.equal(value, every.components[n]) for n, value in components.items())
        totals.append(total)
    torch.testing.assert_close(torch.stack(totals).mean(), every.total)
    assert loss.weights["boundary"] == pytest.approx(0.9)
    assert loss.weights["base"] == 1.0


def test_between_the_steps_nothing_is_decoded_or_needed_and_there_is_a_graph() -> None:
    given = inputs(dtype=torch.float32)
    velocity = given["velocity"].requires_grad_()
    loss = RemovalLoss(base=0, decoder=never, specialized_every=2)
    total, components = loss(velocity, given["target_velocity"], step=1)
    assert components == {}
    total.backward()
    assert torch.equal(velocity.grad, torch.zeros_like(velocity))


@pytest.mark.parametrize("step", [None, -1, 1.0])
def test_a_step_that_is_none_raises(step: object) -> None:
    loss = RemovalLoss(decoder=upsampled, specialized_every=2)
    with pytest.raises(ValueError, match="Expected `step` to be"):
        loss(**inputs(), step=step)


def test_bfloat16_is_computed_in_float32() -> None:
    given = inputs(dtype=torch.bfloat16)
    output = RemovalLoss(decoder=upsampled)(**given)
    wide = RemovalLoss(decoder=upsampled)(**{n: t.float() for n, t in given.items()})
    assert output.total.dtype == torch.float32
    for name, value in wide.components.items():
        torch.testing.assert_close(output.components[name], value, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("missing", ["x_t", "sigma", "mask", "target", "decoder"])
def test_what_a_pixel_loss_needs_is_named_when_missing(missing: str) -> None:
    given = inputs()
    loss = RemovalLoss(detail=0, decoder=None if missing == "decoder" else upsampled)
    given.pop(missing, None)
    message = rf"Expected `{missing}` for the losses \['boundary', 'consistency'\]"
    with pytest.raises(ValueError, match=message):
        loss(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": torch.tensor([100.0, 200.0, 300.0])}, "division by 1000"),
        ({"sigma": torch.ones(3, 1)}, r"Expected `sigma` to have shape \(B,\) with B = 3"),
        ({"sigma": torch.tensor(0.5)}, r"Expected `sigma` to have shape \(B,\) with B = 3"),
        ({"mask": torch.zeros(1, 1, 8, 12)}, r"Expected `mask` to have shape \(B, ...\)"),
        ({"target": torch.full((3, 3, 8, 12), -1.0)}, r"Expected `target` to be an image in \[0"),
        ({"target": torch.full((3, 3, 8, 12), torch.nan)}, "Expected `target` to be an image"),
        ({"target": torch.zeros(3, 3, 16, 24)}, "Expected `target` to have the shape"),
        ({"height": 6, "width": 4}, r"the size of the latents, \(4, 6\), but got 6 and 4"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemovalLoss(decoder=upsampled)(**{**inputs(), **change})


def test_packed_latents_need_their_sizes() -> None:
    given = inputs()
    given |= {name: pack_latents(given[name]) for name in ("velocity", "target_velocity", "x_t")}
    loss = RemovalLoss(decoder=upsampled)
    with pytest.raises(ValueError, match="Expected latent `height` and `width` to be integers"):
        loss(**given)
    with pytest.raises(ValueError, match=r"= 4 tokens for latents of 4x4, but got 6"):
        loss(**given, height=4, width=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boundary": -0.1}, "Expected `boundary` to be finite and >= 0, but got -0.1"),
        ({"detail": float("nan")}, "Expected `detail` to be finite"),
        ({"base": float("inf")}, "Expected `base` to be finite"),
        (OFF, "at least one loss weight"),
        ({"max_sigma": 0.0}, r"Expected `max_sigma` to be in \(0, 1\], but got 0.0"),
        ({"max_sigma": 700}, r"Expected `max_sigma` to be in \(0, 1\], but got 700"),
        ({"weighting": "logit_normal"}, "Expected `weighting` to be one of"),
        ({"effect_band": -1}, "Expected `effect_band` to be an integer >= 0, but got -1"),
        ({"window_margin": 1.5}, "Expected `window_margin` to be an integer >= 0, but got 1.5"),
        ({"specialized_every": 0}, "Expected `specialized_every` to be an integer >= 1"),
    ],
)
def test_settings_out_of_range_raise(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemovalLoss(**arguments)
