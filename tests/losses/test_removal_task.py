from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from moe_lora.losses import RemovalLoss, compute_removal_task_loss

NAMES = ["base", "boundary", "consistency", "detail"]
DEFAULTS = {"base": 1.0, "boundary": 0.3, "consistency": 0.5, "detail": 0.2}


def doubled(latents: Tensor) -> Tensor:
    return latents.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    velocity, target_velocity, x_t = torch.rand(3, 2, 3, 4, 6, generator=generator)
    mask = torch.zeros(2, 1, 8, 12)
    mask[..., 2:5, 3:7] = 1
    return {
        "velocity": velocity,
        "target_velocity": target_velocity,
        "x_t": x_t,
        "sigma": torch.tensor([0.2, 0.6]),
        "mask": mask,
        "target": torch.rand(2, 3, 8, 12, generator=generator),
    }


def test_by_default_only_the_base_loss_is_on() -> None:
    given = inputs()
    total, components = compute_removal_task_loss(given["velocity"], given["target_velocity"])
    assert list(components) == ["base"]
    torch.testing.assert_close(
        total, torch.nn.functional.mse_loss(given["velocity"], given["target_velocity"])
    )


@pytest.mark.parametrize(
    "on", [c for n in range(1, 5) for c in itertools.combinations(NAMES, n)], ids="+".join
)
def test_flags_switch_components_at_the_documented_weights(on: tuple[str, ...]) -> None:
    flags = {f"enable_{name}_loss": name in on for name in NAMES}
    total, components = compute_removal_task_loss(**inputs(), **flags, decoder=doubled)
    expected = RemovalLoss(**{n: DEFAULTS[n] if n in on else 0 for n in NAMES}, decoder=doubled)(
        **inputs()
    )
    assert tuple(components) == on
    assert torch.equal(total, expected.total)


def test_weights_and_settings_are_handed_on() -> None:
    flags = {f"enable_{name}_loss": True for name in NAMES}
    weights = {"base": 2.0, "boundary": 3.0, "consistency": 5.0, "detail": 7.0}
    settings = {"weighting": "cosmap", "max_sigma": 0.5, "boundary_width": 1, "decoder": doubled}
    total, components = compute_removal_task_loss(
        **inputs(), **flags, **{f"{n}_loss_weight": w for n, w in weights.items()}, **settings
    )
    expected = RemovalLoss(**weights, **settings)(**inputs())
    assert components == expected.components
    torch.testing.assert_close(total, sum(weights[n] * components[n] for n in NAMES))


class Windowed:
    def __init__(self) -> None:
        self.windows: list[tuple[int, ...]] = []

    def __call__(self, latents: Tensor) -> Tensor:
        return doubled(latents)

    def in_windows(self, latents: Tensor, windows: list[tuple[int, ...]]) -> Tensor:
        self.windows += windows
        return doubled(latents)


def test_ways_to_decode_less_are_handed_on() -> None:
    flags = {f"enable_{name}_loss": True for name in NAMES}
    decoder = Windowed()
    settings = {"effect_band": 3, "window_margin": 1, "specialized_every": 2, "decoder": decoder}
    total, components = compute_removal_task_loss(**inputs(), **flags, **settings, step=4)
    expected = RemovalLoss(**DEFAULTS, **settings)(**inputs(), step=4)
    assert components == expected.components
    assert torch.equal(total, expected.total)
    assert decoder.windows == [(0, 0, 5, 4)] * 4
    assert list(compute_removal_task_loss(**inputs(), **flags, **settings, step=5).components) == [
        "base"
    ]


def test_sizes_are_handed_on() -> None:
    with pytest.raises(ValueError, match="but got 6 and 4"):
        compute_removal_task_loss(
            **inputs(), enable_detail_loss=True, decoder=doubled, height=6, width=4
        )
