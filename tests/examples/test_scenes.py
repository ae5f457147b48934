"""Scenes are what they claim: photographs split apart, objects covered, shadows left outside."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy import ndimage

import scenes
from scenes import MASK_KINDS, OBJECT_KINDS, Scene

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


def crops(name: str) -> Iterator[np.ndarray]:
    for seed in range(6):
        yield scenes.random_crop(rng(seed), scenes.load_photograph(name), SIZE)


def test_no_photograph_is_in_both_splits() -> None:
    train, test = scenes.photographs("train"), scenes.photographs("test")
    assert len(test) >= 3
    assert not set(train) & set(test)
    files = [*scenes.TRAIN_PHOTOGRAPHS.values(), *scenes.TEST_PHOTOGRAPHS.values()]
    assert len(files) == len(set(files))
    assert set(scenes.TRAIN_WEIGHTS) == set(train)
    assert set(scenes.CUTOUT_PHOTOGRAPHS) <= set(train)
    with pytest.raises(ValueError, match='Expected `split` to be "train" or "test"'):
        scenes.photographs("val")


@pytest.mark.parametrize("name", [*scenes.TRAIN_PHOTOGRAPHS, *scenes.TEST_PHOTOGRAPHS])
def test_every_photograph_loads(name: str) -> None:
    photograph = scenes.load_photograph(name)
    assert photograph.ndim == 3
    assert photograph.shape[2] == 3
    assert min(photograph.shape[:2]) >= 256
    assert photograph.min() >= 0
    assert photograph.max() <= 1
    assert photograph.std() > 0.02
    with pytest.raises(ValueError, match="read-only"):
        photograph[0, 0] = 0


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `name` to be one of .*coffee.* but got 'lena'"):
        scenes.load_photograph("lena")
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of .*, but got 'tree'"):
        scenes.draw_object(rng(), "tree", SIZE, (40, 40), 10, 0.5)
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of .*, but got 'cloud'"):
        scenes.cover(rng(), np.ones((8, 8), dtype=np.float32), "cloud")


def test_same_seed_same_scene_other_seed_other_scene() -> None:
    first, again, other = (scenes.random_scene(rng(s), "train", SIZE) for s in (1, 1, 2))
    np.testing.assert_array_equal(first.src, again.src)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert np.abs(first.src - other.src).max() > 0.1


def test_crops_keep_limits_where_the_photograph_has_such_places() -> None:
    half_black = np.zeros((200, 300, 3), dtype=np.float32)
    half_black[:, 150:] = rng().uniform(0.4, 1, (200, 150, 3))
    for seed in range(10):
        crop = scenes.random_crop(rng(seed), half_black, 64, min_mean=0.3)
        assert crop.shape == (64, 64, 3)
        assert crop.mean() > 0.25
    flat = np.full((100, 100, 3), 0.5, dtype=np.float32)
    np.testing.assert_allclose(scenes.random_crop(rng(), flat, 32), 0.5, atol=1 / 255)


def test_resize_keeps_a_ramp() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 128, dtype=np.float32)[:, None, None], (128, 64, 3))
    small = scenes.resize(np.ascontiguousarray(ramp), 32, 16)
    expected = (np.arange(32) * 4 + 1.5) / 127
    np.testing.assert_allclose(small[2:-2, 5, 0], expected[2:-2], atol=0.01)


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


@pytest.mark.parametrize("kind", OBJECT_KINDS)
@pytest.mark.parametrize("radius", [8.0, 16.0])
def test_objects_are_where_and_as_large_as_asked(kind: str, radius: float) -> None:
    rgb, alpha = scenes.draw_object(rng(), kind, SIZE, (50.0, 40.0), radius, 0.6)
    assert rgb.shape == (SIZE, SIZE, 3)
    assert alpha.shape == (SIZE, SIZE)
    rows, columns = np.nonzero(alpha > 0.5)
    assert abs(rows.mean() - 50) < 0.5 * radius
    assert abs(columns.mean() - 40) < 0.5 * radius
    assert 0.3 * radius**2 < alpha.sum() < 6 * radius**2
    assert rgb[alpha > 0.5].std() > 0.01


def test_a_sphere_is_a_disk() -> None:
    alpha = scenes.draw_object(rng(), "sphere", SIZE, (48.0, 48.0), 20.0, 0.5)[1]
    assert alpha.sum() == pytest.approx(np.pi * 20**2, rel=0.005)


def test_coin_boxes_hold_the_24_coins() -> None:
    boxes = scenes.coin_boxes()
    assert len(boxes) == 24
    for rows, columns in boxes:
        assert 30 < rows.stop - rows.start < 70
        assert 30 < columns.stop - columns.start < 70


@pytest.mark.parametrize(("light_x", "side"), [(-0.6, 1), (0.6, -1)])
def test_shadows_fall_away_from_the_light(light_x: float, side: int) -> None:
    alpha = scenes.draw_object(rng(), "sphere", SIZE, (48.0, 48.0), 12.0, light_x)[1]
    shadow = scenes.cast_shadow(rng(), alpha, (48.0, 48.0), 12.0, light_x)
    visible = shadow * (1 - alpha)
    centre = float((visible.sum(0) * np.arange(SIZE)).sum() / visible.sum())
    assert side * (centre - 48) > 6


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_free_masks_come_small_and_large(kind: str) -> None:
    masks = [scenes.random_mask(rng(seed), SIZE, kind) for seed in range(40)]
    assert all(set(np.unique(mask)) <= {0.0, 1.0} for mask in masks)
    areas = sorted(float(mask.mean()) for mask in masks)
    assert areas[4] < 0.05
    assert areas[-4] > 0.1


def test_jitter_keeps_the_range_and_changes_the_colours() -> None:
    image = next(crops("flower"))
    changed = scenes.jitter_colours(rng(), image)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert np.abs(changed - image).max() > 0.05
