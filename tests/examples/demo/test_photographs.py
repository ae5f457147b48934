"""Photographs load, are split apart, and are cut within the limits asked for."""

from __future__ import annotations

import numpy as np
import pytest

import photographs

SIZE = 96


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_no_photograph_is_in_both_splits() -> None:
    train, test = photographs.photographs("train"), photographs.photographs("test")
    assert len(test) >= 3
    assert not set(train) & set(test)
    files = [*photographs.TRAIN_PHOTOGRAPHS.values(), *photographs.TEST_PHOTOGRAPHS.values()]
    assert len(files) == len(set(files))
    assert set(photographs.TRAIN_WEIGHTS) == set(train)
    with pytest.raises(ValueError, match='Expected `split` to be "train" or "test"'):
        photographs.photographs("val")


@pytest.mark.parametrize("name", [*photographs.TRAIN_PHOTOGRAPHS, *photographs.TEST_PHOTOGRAPHS])
def test_every_photograph_loads(name: str) -> None:
    photograph = photographs.load_photograph(name)
    assert photograph.ndim == 3
    assert photograph.shape[2] == 3
    assert min(photograph.shape[:2]) >= 256
    assert photograph.min() >= 0
    assert photograph.max() <= 1
    assert photograph.std() > 0.02
    with pytest.raises(ValueError, match="read-only"):
        photograph[0, 0] = 0


def test_crops_keep_limits_where_the_photograph_has_such_places() -> None:
    half_black = np.zeros((200, 300, 3), dtype=np.float32)
    half_black[:, 150:] = rng().uniform(0.4, 1, (200, 150, 3))
    for seed in range(10):
        crop = photographs.random_crop(rng(seed), half_black, 64, min_mean=0.3)
        assert crop.shape == (64, 64, 3)
        assert crop.mean() > 0.25
    flat = np.full((100, 100, 3), 0.5, dtype=np.float32)
    np.testing.assert_allclose(photographs.random_crop(rng(), flat, 32), 0.5, atol=1 / 255)


def test_resize_keeps_a_ramp() -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 128, dtype=np.float32)[:, None, None], (128, 64, 3))
    small = photographs.resize(np.ascontiguousarray(ramp), 32, 16)
    expected = (np.arange(32) * 4 + 1.5) / 127
    np.testing.assert_allclose(small[2:-2, 5, 0], expected[2:-2], atol=0.01)


def test_coin_boxes_hold_the_24_coins() -> None:
    boxes = photographs.coin_boxes()
    assert len(boxes) == 24
    for rows, columns in boxes:
        assert 30 < rows.stop - rows.start < 70
        assert 30 < columns.stop - columns.start < 70


def test_jitter_keeps_the_range_and_changes_the_colors() -> None:
    image = photographs.random_crop(rng(), photographs.load_photograph("flower"), SIZE)
    changed = photographs.jitter_colors(rng(), image)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert np.abs(changed - image).max() > 0.05


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `name` to be one of .*coffee.* but got 'lena'"):
        photographs.load_photograph("lena")


def test_photographs_are_drawn_by_their_weight() -> None:
    random = rng()
    drawn = [photographs.random_photograph(random, "train") for _ in range(4000)]
    total = sum(photographs.TRAIN_WEIGHTS.values())
    for name, weight in photographs.TRAIN_WEIGHTS.items():
        expected = weight / total
        deviation = (expected * (1 - expected) / 4000) ** 0.5
        assert abs(drawn.count(name) / 4000 - expected) < 5 * deviation
    assert {photographs.random_photograph(random, "test") for _ in range(50)} == set(
        photographs.photographs("test")
    )
