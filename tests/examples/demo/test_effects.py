"""Effects have the shapes and strengths that their formulas say."""

from __future__ import annotations

import numpy as np
import pytest

import effects

SIZE = 96


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_light_falls_as_that_of_a_point_before_a_wall() -> None:
    field = effects.light_field(SIZE, (40, 30), 12)
    assert field[40, 30] == 1
    np.testing.assert_allclose(field[40, 42], 2**-1.5, rtol=1e-6)
    np.testing.assert_allclose(field[76, 30], 10**-1.5, rtol=1e-6)
    ys, xs = np.mgrid[:SIZE, :SIZE]
    angle = np.arctan2(np.hypot(ys - 40, xs - 30), 12)
    # cos(angle) / distance^2, over that in the middle
    np.testing.assert_allclose(field, np.cos(angle) ** 3, rtol=1e-5)


def test_the_strongest_channel_of_a_light_is_full() -> None:
    colors = [effects.lamp_color(rng(seed)) for seed in range(20)]
    assert all(color.max() == 1 for color in colors)
    assert len({tuple(color) for color in colors}) == 20


@pytest.mark.parametrize("kind", effects.LAMPS)
def test_lamps_stand_on_their_foot_and_shine(kind: str) -> None:
    color = np.array([1, 0.8, 0.5], np.float32)
    rgb, alpha, center = effects.draw_lamp(rng(), kind, SIZE, (80.0, 48.0), 40.0, color)
    assert 0 <= rgb.min() <= rgb.max() <= 1
    rows, columns = np.flatnonzero(alpha.max(1) > 0.5), np.flatnonzero(alpha.max(0) > 0.5)
    assert 78 <= rows[-1] <= 82
    assert 37 <= rows[-1] - rows[0] + 1 <= 44
    assert abs((columns[0] + columns[-1]) / 2 - 48) <= 1
    middle = rgb[round(center[0]), round(center[1])]
    assert alpha[round(center[0]), round(center[1])] > 0.5
    np.testing.assert_allclose(middle, 0.35 + 0.65 * color, atol=0.2)
    assert middle.mean() > rgb[rows[-1] - 1, 48].mean() - 0.05


def test_a_mirror_turns_rows_over_and_waves_shift_them() -> None:
    image = rng().random((SIZE, SIZE, 3)).astype(np.float32)
    still = effects.mirror(image, 40, np.zeros((SIZE, SIZE), np.float32))
    np.testing.assert_allclose(still[40:80], image[:40][::-1], atol=1e-6)
    shifted = effects.mirror(image, 40, np.full((SIZE, SIZE), 3, np.float32))
    np.testing.assert_allclose(shifted[40:80, :-3], image[:40, 3:][::-1], atol=1e-6)


def test_texts_lie_inside_of_the_image() -> None:
    widths = []
    for seed in range(20):
        matte = effects.draw_text(rng(seed), SIZE, "PREVIEW")
        assert matte.dtype == np.float32
        assert matte.max() > 0.8
        rows, columns = np.nonzero(matte > 0.02)
        assert min(rows.min(), columns.min()) >= 4
        assert max(rows.max(), columns.max()) < SIZE - 4
        widths.append(np.ptp(columns))
    assert min(widths) < 0.6 * SIZE < max(widths)


@pytest.mark.parametrize("margin", [6.0, 9.0])
def test_plates_have_the_area_of_a_round_rectangle(margin: float) -> None:
    alpha = np.zeros((128, 128), np.float32)
    alpha[50:66, 30:90] = 1
    plate = effects.draw_plate(alpha, margin, 4.0)
    # The rows and columns of the text are counted from their middles.
    area = (15 + 2 * margin) * (59 + 2 * margin) - (4 - np.pi) * 4.0**2
    assert abs(plate.sum() / area - 1) < 0.02
    assert plate[alpha > 0].min() == 1


def test_plates_turn_with_their_text() -> None:
    ys, xs = np.mgrid[:128, :128] - 64.0
    along, across = (xs + ys) / 2**0.5, (ys - xs) / 2**0.5
    alpha = ((np.abs(along) < 30) & (np.abs(across) < 6)).astype(np.float32)
    plate = effects.draw_plate(alpha, 8.0, 2.0)
    assert plate[(np.abs(along) < 34) & (np.abs(across) < 11)].min() > 0.9
    assert plate[(np.abs(along) > 42) | (np.abs(across) > 18)].max() < 0.1


def test_stains_are_flat_and_where_they_are_wanted() -> None:
    for seed in range(10):
        stain = effects.draw_stain(rng(seed), SIZE, (60.0, 40.0), 16.0)
        assert 0 <= stain.min() <= stain.max() <= 1
        rows, columns = np.nonzero(stain > 0.5)
        assert abs(rows.mean() - 60) < 4
        assert abs(columns.mean() - 40) < 5
        assert rows.std() < 0.75 * columns.std()
        assert 0.5 < (stain > 0.5).sum() / (0.45 * np.pi * 16**2) < 1.8
