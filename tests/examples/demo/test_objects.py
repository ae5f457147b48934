"""Objects are where they are asked for, and their shadows fall away from the light."""

from __future__ import annotations

import numpy as np
import pytest

import objects
from objects import OBJECT_KINDS
from photographs import TEST_PHOTOGRAPHS, TRAIN_PHOTOGRAPHS

SIZE = 96


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("kind", OBJECT_KINDS)
@pytest.mark.parametrize("radius", [8.0, 16.0])
def test_objects_are_where_and_as_large_as_asked(kind: str, radius: float) -> None:
    rgb, alpha = objects.draw_object(rng(), kind, SIZE, (50.0, 40.0), radius, 0.6)
    assert rgb.shape == (SIZE, SIZE, 3)
    assert alpha.shape == (SIZE, SIZE)
    rows, columns = np.nonzero(alpha > 0.5)
    assert abs(rows.mean() - 50) < 0.5 * radius
    assert abs(columns.mean() - 40) < 0.5 * radius
    assert 0.3 * radius**2 < alpha.sum() < 6 * radius**2
    assert rgb[alpha > 0.5].std() > 0.01


def test_a_sphere_is_a_disk() -> None:
    alpha = objects.draw_object(rng(), "sphere", SIZE, (48.0, 48.0), 20.0, 0.5)[1]
    assert alpha.sum() == pytest.approx(np.pi * 20**2, rel=0.005)


@pytest.mark.parametrize(("light_x", "side"), [(-0.6, 1), (0.6, -1)])
def test_shadows_fall_away_from_the_light(light_x: float, side: int) -> None:
    alpha = objects.draw_object(rng(), "sphere", SIZE, (48.0, 48.0), 12.0, light_x)[1]
    shadow = objects.cast_shadow(rng(), alpha, (48.0, 48.0), 12.0, light_x)
    visible = shadow * (1 - alpha)
    center = float((visible.sum(0) * np.arange(SIZE)).sum() / visible.sum())
    assert side * (center - 48) > 6


def test_cutouts_come_from_training_photographs() -> None:
    assert set(objects.CUTOUT_PHOTOGRAPHS) <= set(TRAIN_PHOTOGRAPHS)
    assert not set(objects.CUTOUT_PHOTOGRAPHS) & set(TEST_PHOTOGRAPHS)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected `kind` to be one of .*, but got 'tree'"):
        objects.draw_object(rng(), "tree", SIZE, (40, 40), 10, 0.5)
