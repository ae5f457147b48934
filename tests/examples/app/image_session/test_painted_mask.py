from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from image_session.painted_mask import (
    KEEP,
    LONGEST_SIDE,
    REMOVE,
    editor_image,
    grown,
    mask_from_file,
    repainted,
    resized,
    with_mask,
)
from image_session.photo import open_photo


def layer(size: tuple[int, int], color: tuple[int, int, int], box: tuple[int, ...]) -> Image.Image:
    drawn = Image.new("RGBA", size)
    ImageDraw.Draw(drawn).rectangle(box, fill=(*color, 178))
    return drawn


def test_strokes_add_and_take_away() -> None:
    mask = np.zeros((20, 30), bool)
    mask[:5] = True
    layers = [layer((30, 20), REMOVE, (10, 10, 19, 14)), layer((30, 20), KEEP, (0, 0, 4, 19))]
    expected = mask.copy()
    expected[10:15, 10:20] = True
    expected[:, :5] = False
    assert np.array_equal(repainted(mask, layers), expected)


def test_without_strokes_a_mask_stays_as_it_is() -> None:
    mask = np.random.default_rng(0).random((40, 50)) < 0.5
    assert np.array_equal(repainted(mask, []), mask)
    assert np.array_equal(repainted(mask, [Image.new("RGBA", (25, 20))]), mask)


def test_strokes_on_a_smaller_editor_are_scaled() -> None:
    painted = repainted(np.zeros((200, 400), bool), [layer((100, 50), REMOVE, (25, 10, 74, 39))])
    assert painted.shape == (200, 400)
    assert painted[60, 200]
    assert not painted[20, 200]
    assert abs(painted.mean() - 50 * 30 / (100 * 50)) < 0.01


def test_the_last_color_counts_where_strokes_cross() -> None:
    drawn = Image.new("RGBA", (10, 10))
    for color in (REMOVE, KEEP):
        drawn.alpha_composite(Image.new("RGBA", (10, 10), (*color, 178)))
    assert not repainted(np.ones((10, 10), bool), [drawn]).any()


def test_large_images_are_shown_smaller() -> None:
    large = Image.new("RGB", (2 * LONGEST_SIDE, 100))
    assert editor_image(large).size == (LONGEST_SIDE, 50)
    small = Image.new("RGB", (64, 48))
    assert editor_image(small) is small


def test_the_mask_is_seen_on_the_image() -> None:
    mask = np.zeros((8, 8), bool)
    mask[:4] = True
    shown = np.array(with_mask(Image.new("RGB", (8, 8), "white"), mask))
    assert (shown[4:] == 255).all()
    assert abs(shown[0, 0].astype(int) - (226, 142, 77)).max() <= 1  # 0.7 of the color


def test_growing_is_the_distance_to_the_mask() -> None:
    mask = np.zeros((21, 21), bool)
    mask[10, 10] = True
    rows, columns = np.indices(mask.shape) - 10
    assert np.array_equal(grown(mask, 4), rows**2 + columns**2 <= 16)
    assert not grown(np.zeros((4, 4), bool), 3).any()
    with pytest.raises(ValueError, match="at least 1 pixel"):
        grown(mask, 0)


def test_a_mask_file_of_another_size_is_scaled(photo_file: Path, tmp_path: Path) -> None:
    photo = open_photo(photo_file, most_megapixels=1)
    half = np.zeros((30, 45), np.uint8)
    half[10:20, 10:30] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    mask = mask_from_file(tmp_path / "mask.png", photo)
    assert mask.shape == (61, 90)
    assert abs(mask.mean() - (half > 0).mean()) < 0.01
    np.save(tmp_path / "mask.npy", resized(half > 0, (90, 61)))
    assert mask_from_file(tmp_path / "mask.npy", photo).shape == (61, 90)
    (tmp_path / "mask.png").write_text("no mask")
    with pytest.raises(ValueError, match=r"mask\.png to be a mask"):
        mask_from_file(tmp_path / "mask.png", photo)
