"""Scenes are what they claim: objects covered, shadows left outside, the rest untouched."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

import scenes
from scenes import MASK_KINDS, Scene

SIZE = 96


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def many() -> list[Scene]:
    return [
        scenes.random_scene(rng(seed), split, SIZE, mask_kind=MASK_KINDS[seed % 3])
        for split in ("train", "test")
        for seed in range(9)
    ]


def test_same_seed_same_scene_other_seed_other_scene() -> None:
    first, again, other = (scenes.random_scene(rng(s), "train", SIZE) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.src, again.src)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert np.abs(first.src - other.src).max() > 0.1


def test_arrays_have_their_shapes_and_ranges(many: list[Scene]) -> None:
    for scene in many:
        for image in (scene.src, scene.result, scene.ref, scene.shadowed):
            assert image.shape == (SIZE, SIZE, 3)
        for image in (scene.mask, scene.shadow, scene.alpha):
            assert image.shape == (SIZE, SIZE)
        for name in ("src", "result", "ref", "shadowed", "mask", "shadow", "alpha"):
            array = getattr(scene, name)
            assert array.dtype == np.float32
            assert array.min() >= 0
            assert array.max() <= 1
        assert set(np.unique(scene.mask)) == {0.0, 1.0}
        assert not np.array_equal(scene.ref, scene.result)


def test_masks_cover_the_object_and_leave_most_of_the_shadow(many: list[Scene]) -> None:
    left = []
    for scene in many:
        assert scene.mask[scene.alpha > 0.02].min() == 1
        visible = scene.shadow * (1 - scene.alpha)
        left.append(float((visible * (1 - scene.mask)).sum() / visible.sum()))
    assert np.mean(left) > 0.7
    assert min(left) > 0.4


def test_outside_of_mask_and_shadow_nothing_changes(many: list[Scene]) -> None:
    for scene in many:
        untouched = (scene.mask == 0) & (scene.shadow == 0)
        assert untouched.mean() > 0.2
        np.testing.assert_allclose(scene.src[untouched], scene.result[untouched], atol=1e-6)


def test_shadows_darken_by_35_to_65_percent_where_they_are_full(many: list[Scene]) -> None:
    for scene in many:
        full = (scene.shadow > 0.97) & (scene.result.min(2) > 0.1)
        if not full.any():
            continue
        ratio = scene.shadowed[full] / scene.result[full]
        assert ratio.min() > 0.34
        assert ratio.max() < 0.67


def test_shadows_can_be_seen(many: list[Scene]) -> None:
    for scene in many:
        if scene.result.mean() < 0.3:
            continue
        change = (scene.result - scene.src).mean(2) * (scene.mask == 0)
        assert (change > 0.08).sum() > 0.002 * SIZE * SIZE


def test_mask_kind_is_the_one_asked_for(many: list[Scene]) -> None:
    for index, scene in enumerate(many):
        assert scene.mask_kind == MASK_KINDS[index % 9 % 3]
        if scene.mask_kind == "box":
            rows, columns = np.flatnonzero(scene.mask.any(1)), np.flatnonzero(scene.mask.any(0))
            assert scene.mask.sum() == len(rows) * len(columns)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_cover_stays_near_the_object(kind: str) -> None:
    alpha = np.zeros((SIZE, SIZE), dtype=np.float32)
    alpha[40:60, 30:50] = 1
    distance = ndimage.distance_transform_edt(alpha == 0)
    for seed in range(10):
        mask = scenes.cover(rng(seed), alpha, kind)
        assert mask[alpha > 0].min() == 1
        assert distance[mask > 0].max() < 20
        assert mask.sum() > alpha.sum()


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_free_masks_come_small_and_large(kind: str) -> None:
    masks = [scenes.random_mask(rng(seed), SIZE, kind) for seed in range(40)]
    assert all(set(np.unique(mask)) <= {0.0, 1.0} for mask in masks)
    areas = sorted(float(mask.mean()) for mask in masks)
    assert areas[4] < 0.05
    assert areas[-4] > 0.1


def test_unknown_mask_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of .*, but got 'cloud'"):
        scenes.cover(rng(), np.ones((8, 8), dtype=np.float32), "cloud")
