"""Kinds of removal change what they say outside the mask, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kind_sheet
import kinds
import scenes
from effects import LAMPS
from kind_layers import COMPOSERS, Thing, with_glow, with_reflection, with_stain, with_text
from scenes import MASK_KINDS, Scene

SIZE = 96
COUNT = 6


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def many() -> dict[str, list[Scene]]:
    return {
        kind: [
            kinds.random_kind_scene(
                rng(seed),
                ("train", "test")[seed % 2],
                SIZE,
                kind=kind,
                mask_kind=MASK_KINDS[seed % 3],
            )
            for seed in range(COUNT)
        ]
        for kind in kinds.KINDS
    }


def disk(rng: Any, background: Any) -> Thing:
    """Draw a red disk of radius 12 around row 40 and column 48."""
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    alpha = (np.hypot(ys - 40, xs - 48) < 12).astype(np.float32)
    rgb = np.zeros((SIZE, SIZE, 3), np.float32)
    rgb[..., 0] = 0.9
    return Thing(rgb, alpha, (40.0, 48.0), 12.0, 0.5, "disk")


def plain(value: float = 0.8) -> Any:
    return np.full((SIZE, SIZE, 3), value, np.float32)


def test_there_is_a_composer_for_every_kind() -> None:
    assert tuple(COMPOSERS) == kinds.KINDS
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of .*, but got 'fog'"):
        kinds.compose_kind(rng(), "fog", plain(), plain(), cover=lambda rng, alpha: alpha)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_arrays_have_their_shapes_and_ranges(many: dict[str, list[Scene]], kind: str) -> None:
    for scene in many[kind]:
        assert scene.kind == kind
        for name in ("src", "result", "ref", "shadowed", "mask", "shadow", "alpha"):
            array = getattr(scene, name)
            assert array.dtype == np.float32, name
            assert array.shape[:2] == (SIZE, SIZE)
            assert 0 <= array.min() <= array.max() <= 1.0001, name
        assert set(np.unique(scene.mask)) == {0.0, 1.0}
        assert scene.mask[scene.alpha > 0.02].min() == 1
        expected = scene.alpha[..., None]
        outside = scene.alpha == 0
        np.testing.assert_allclose(scene.src[outside], scene.shadowed[outside], atol=1e-6)
        assert np.abs(scene.src - scene.result)[expected[..., 0] > 0.6].mean() > 0.02


@pytest.mark.parametrize("kind", ["shadow", "reflection", "text", "stain"])
def test_without_object_and_effect_nothing_changes(many: dict[str, list[Scene]], kind: str) -> None:
    for scene in many[kind]:
        untouched = (scene.alpha == 0) & (scene.shadow == 0)
        assert untouched.mean() > 0.2
        np.testing.assert_allclose(scene.src[untouched], scene.result[untouched], atol=1e-6)


@pytest.mark.parametrize("kind", ["glow", "reflection", "text", "stain"])
def test_effects_are_seen_outside_of_the_mask_but_not_everywhere(
    many: dict[str, list[Scene]], kind: str
) -> None:
    good = 0
    for scene in many[kind]:
        change = np.abs(scene.src - scene.result).mean(2) > kinds.VISIBLE
        share = float((change & (scene.mask == 0)).mean())
        least = 0.0 if kind == "stain" else kinds.LEAST[kind]
        good += least <= share <= (0.03 if kind == "stain" else kinds.LARGEST)
    assert good >= COUNT - 1


def test_the_light_of_a_lamp_goes_with_it(many: dict[str, list[Scene]]) -> None:
    for scene in many["glow"]:
        assert (scene.src - scene.result)[scene.mask == 0].min() > -1e-6


def test_light_is_a_gain_by_channel_away_from_the_bloom() -> None:
    ys, xs = np.mgrid[:SIZE, :SIZE]
    for seed in range(8):
        layers = with_glow(rng(seed), plain(0.5), disk)
        assert layers.thing.name in LAMPS
        middle, height = layers.thing.middle, 2 * layers.thing.radius
        far = np.hypot(ys - middle[0], xs - middle[1]) > 1.4 * height
        gains = (layers.behind / layers.result - 1)[far] / layers.effect[far][:, None]
        np.testing.assert_allclose(gains, np.broadcast_to(gains[0], gains.shape), rtol=0.02)
        assert 1.3 < gains[0].max() < 3.1
        ambient = layers.result[0, 0] / 0.5
        assert 0.32 < ambient.min() < ambient.max() < 0.61


def test_a_reflection_is_the_object_turned_over() -> None:
    for seed in range(5):
        layers = with_reflection(rng(seed), plain(0.0), disk)
        seen = layers.behind[..., 0]
        foot = layers.thing.foot
        assert foot == 52
        assert seen[:foot].max() == 0
        rows, columns = np.nonzero(seen > 0.02)
        assert rows.min() <= foot + 1
        assert abs(columns.mean() - 48) < 2
        # The disk is 23 pixels high and wide; its lower edge meets the foot.
        assert abs(np.ptp(columns) - 23) < 5
        assert np.ptp(rows) < 28
        # red only, as the object, and weaker than it
        assert layers.behind[..., 1:].max() == 0
        assert 0.15 < seen.max() < 0.75
        assert seen[foot : foot + 6].max() > seen[foot + 18 :].max()


def test_a_stain_stays_and_a_contact_shadow_goes() -> None:
    for seed in range(5):
        layers = with_stain(rng(seed), plain(), disk)
        darker = 1 - layers.result / 0.8
        marked = layers.mark > 0.3
        assert darker[~(layers.mark > 0)].max() < 1e-6
        ratio = darker[marked] / layers.mark[marked][:, None]
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[0], ratio.shape), atol=1e-4)
        assert 0.3 < ratio.max() < 0.81
        gone = 1 - layers.behind / layers.result.clip(0.01, None)
        np.testing.assert_allclose(gone[..., 0], 0.4 * layers.effect, atol=1e-4)
        rows, _ = np.nonzero(layers.effect > 0.3)
        assert abs(rows.mean() - 52) < 3


def test_stains_reach_beyond_the_mask() -> None:
    for seed in range(6):
        scene = kinds.compose_kind(
            rng(seed), "stain", plain(), plain(), cover=lambda rng, alpha: alpha, draw=disk
        )
        stays = (np.abs(scene.result - 0.8).mean(2) > 2 * kinds.VISIBLE) & (scene.mask == 0)
        assert stays.mean() >= kinds.LEAST["stain"]
        same = np.abs(scene.src - scene.result).max(2) < 0.01
        assert (stays & same).sum() > 0.6 * stays.sum()


def test_texts_are_composed_over_their_plate() -> None:
    plates = 0
    for seed in range(8):
        layers = with_text(rng(seed), plain(0.5), disk)
        assert layers.thing.name != "disk"
        # From 0.5 towards black or white, by the effect.
        moved, strong = layers.behind - 0.5, layers.effect > 0.2
        share = np.median(moved[strong] / layers.effect[strong][:, None])
        assert 0.4 < abs(share) < 0.6
        np.testing.assert_allclose(moved[..., 0], share * layers.effect, atol=1e-4)
        plates += bool((layers.effect == layers.effect.max()).mean() > 0.02)
        assert 0.6 < layers.thing.alpha.max() <= 1
        assert np.array_equal(layers.result, plain(0.5))
    assert 0 < plates < 8


def test_a_shadow_scene_is_that_of_the_demonstration() -> None:
    ours = kinds.random_kind_scene(rng(3), "train", SIZE, kind="shadow", mask_kind="box")
    theirs = scenes.random_scene(rng(3), "train", SIZE, mask_kind="box")
    for name in ("src", "mask", "result", "ref"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_same_seed_same_scene_other_seed_other_scene(kind: str) -> None:
    first, again, other = (
        kinds.random_kind_scene(rng(seed), "train", 64, kind=kind) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.src, again.src)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert np.abs(first.src - other.src).max() > 0.1


def test_the_sheet_has_a_row_for_each_kind(tmp_path: Path) -> None:
    kind_sheet.main(["--output", str(tmp_path / "kinds.png"), "--size", "32", "--count", "1"])
    with Image.open(tmp_path / "kinds.png") as sheet:
        assert sheet.height > 5 * 32
        assert 3 * 32 < sheet.width < 3 * 32 + 150
