from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_lora.masks import CropBox, crop_boxes


def mask_of(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Tensor:
    """Draw a mask of rectangles: top, left, bottom, right."""
    mask = torch.zeros(1, 1, *size)
    for top, left, bottom, right in boxes:
        mask[..., top:bottom, left:right] = 1
    return mask


def one_box(mask: Tensor, resolution: int, **settings: float) -> CropBox:
    (boxes,) = crop_boxes(mask, resolution, **settings)
    (box,) = boxes
    return box


def test_a_box_is_extended_by_its_longer_side_or_the_minimum_and_to_the_size_of_the_model() -> None:
    mask = mask_of((1000, 1000), (400, 500, 420, 560))
    # 20 x 60 and 100 pixels around it are 220 x 260: 260² pixels allow for a factor of 1.087.
    box = one_box(mask, 260, context=0.0, min_context=100)
    assert (box.height, box.width, box.size) == (240, 288, (240, 288))
    # 60 more on each side are 140 x 180, and for 64 x 64 pixels by the same factor 180 x 180.
    box = one_box(mask, 64, context=1.0, min_context=0)
    assert box == CropBox(410 - 90, 530 - 90, 180, 180, (64, 64), ((400, 500, 420, 560),))
    assert one_box(mask, 64, context=1.0, min_context=90).height == 240


def test_a_crop_is_moved_into_the_image() -> None:
    mask = mask_of((500, 500), (0, 470, 30, 500))
    box = one_box(mask, 128)
    assert (box.top, box.left, box.height, box.width) == (0, 500 - 128, 128, 128)
    assert box.size == (128, 128)
    assert box.scale == 1


def test_an_image_that_the_model_can_read_is_its_own_crop() -> None:
    """Even with sides that are no multiples, and long ones."""
    for size in ((61, 90), (10, 1000)):
        mask = mask_of(size, (2, 3, 4, 5))
        assert one_box(mask, 100) == CropBox(0, 0, *size, size, ((2, 3, 4, 5),))


def test_a_long_object_gets_a_crop_that_is_not_as_long() -> None:
    box = one_box(mask_of((2000, 2000), (990, 200, 1000, 1800)), 256, context=0.0)
    assert box.width <= 2.1 * box.height
    assert 0.9 * 256**2 <= box.size[0] * box.size[1] <= 1.1 * 256**2
    # In a panorama there is nothing to extend it to.
    box = one_box(mask_of((100, 4000), (40, 200, 50, 3800)), 128)
    assert (box.height, box.width) == (100, 4000)
    assert box.scale == pytest.approx(128 / math.sqrt(100 * 4000), rel=0.25)


@st.composite
def drawn_masks(draw: st.DrawFn) -> Tensor:
    height, width = draw(st.integers(16, 300)), draw(st.integers(16, 300))
    boxes = []
    for _ in range(draw(st.integers(1, 5))):
        top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        bottom = draw(st.integers(top + 1, min(height, top + 60)))
        boxes.append((top, left, bottom, draw(st.integers(left + 1, min(width, left + 60)))))
    return mask_of((height, width), *boxes)


@settings(max_examples=200, deadline=None)
@given(
    mask=drawn_masks(),
    resolution=st.integers(16, 200),
    context=st.floats(0, 3),
    least=st.integers(0, 40),
)
def test_crops_hold_the_mask_with_its_surroundings_at_the_size_of_the_model(
    mask: Tensor, resolution: int, context: float, least: int
) -> None:
    (boxes,) = crop_boxes(mask, resolution, context=context, min_context=least)
    height, width = mask.shape[2:]
    seen = torch.zeros_like(mask)
    for box in boxes:
        assert 0 <= box.top <= box.top + box.height <= height
        assert 0 <= box.left <= box.left + box.width <= width
        box.cut(seen).fill_(1)
        rows, columns = box.size
        assert rows <= box.height
        assert columns <= box.width
        whole = (box.height, box.width) == (height, width)
        for side, reduced, limit in ((box.height, rows, height), (box.width, columns, width)):
            assert reduced % 16 == 0 or side == limit
        if not whole:
            assert rows * columns <= max((resolution + 16) ** 2, 16 * max(rows, columns))
        # Both sides are reduced alike, up to a pixel.
        assert abs(rows / box.height - columns / box.width) <= 1 / min(box.height, box.width)
    assert (seen[mask > 0] == 1).all()
    where = mask[0, 0].numpy() > 0
    owner = np.zeros(where.shape, dtype=int)
    for box in boxes:
        assert box.parts
        for top, left, bottom, right in box.parts:
            owner[top:bottom, left:right] += 1
            assert box.top <= top < bottom <= box.top + box.height
            assert box.left <= left < right <= box.left + box.width
    assert (owner[where] == 1).all()
    assert owner.max() == 1
    if len(boxes) == 1:
        rows, columns = np.flatnonzero(where.any(1)), np.flatnonzero(where.any(0))
        longer = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
        border = max(math.ceil(context * longer), least)
        box = boxes[0]
        for first, last, start, side, limit in (
            (rows[0], rows[-1] + 1, box.top, box.height, height),
            (columns[0], columns[-1] + 1, box.left, box.width, width),
        ):
            assert side >= min(last - first + 2 * border, limit)
            assert start <= max(first - border, 0) or start + side == limit
            assert start + side >= min(last + border, limit) or start == 0


def test_parts_that_are_far_apart_have_crops_of_their_own() -> None:
    near = mask_of((1000, 1400), (100, 100, 150, 150), (160, 180, 200, 220))
    far = mask_of((1000, 1400), (100, 100, 150, 150), (800, 1200, 850, 1250))
    box = one_box(near, 256)
    assert box.parts == ((100, 100, 150, 150), (160, 180, 200, 220))
    assert box.height >= 100 + 2 * 120
    first, second = crop_boxes(far, 256)[0]
    assert first == one_box(mask_of((1000, 1400), (100, 100, 150, 150)), 256)
    assert second == one_box(mask_of((1000, 1400), (800, 1200, 850, 1250)), 256)
    assert first.scale == second.scale == 1
    # A model that can read all of it needs one.
    assert len(crop_boxes(far, 1200)[0]) == 1


def test_specks_beside_a_large_part_share_its_crop() -> None:
    specks = [(600 + 40 * i, 60, 603 + 40 * i, 63) for i in range(8)]
    mask = mask_of((2000, 2000), (400, 100, 1200, 900), *specks)
    alone = one_box(mask_of((2000, 2000), (400, 100, 1200, 900)), 256)
    assert one_box(mask, 256).scale >= 0.66 * alone.scale


def test_many_scattered_parts_have_few_crops_and_none_is_reduced_much() -> None:
    rng = np.random.default_rng(0)
    places = [(int(y), int(x)) for y, x in rng.integers(0, 1990, (300, 2))]
    mask = mask_of((2000, 2000), *((y, x, y + 6, x + 6) for y, x in places))
    (boxes,) = crop_boxes(mask, 512, context=0.5)
    assert 16 <= len(boxes) <= 40
    assert all(box.scale >= 0.6 for box in boxes)


def test_parts_whose_boxes_overlap_are_one() -> None:
    """A speck in the corner of a large L, however much the crop is reduced."""
    mask = mask_of(
        (2000, 2000), (100, 100, 1900, 160), (1840, 100, 1900, 1900), (150, 1000, 160, 1010)
    )
    assert one_box(mask, 64).parts == ((100, 100, 1900, 1900),)


def test_samples_have_their_own_crops_and_empty_masks_none() -> None:
    first, second = mask_of((300, 200), (10, 10, 40, 40)), mask_of((300, 200), (200, 90, 290, 200))
    found = crop_boxes(torch.cat([first, torch.zeros_like(first), second]), 64)
    assert found == [crop_boxes(first, 64)[0], [], crop_boxes(second, 64)[0]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"resolution": 8}, "`resolution` to be an integer >= 16, but got 8"),
        ({"context": -0.5}, "`context` to be >= 0, but got -0.5"),
        ({"context": math.nan}, "`context` to be >= 0, but got nan"),
        ({"min_context": -1}, "`min_context` to be an integer >= 0"),
        ({"multiple": 0}, "`multiple` to be an integer >= 1"),
        ({"mask": torch.full((1, 1, 4, 4), 255.0)}, "`mask` to have values in"),
    ],
)
def test_arguments_out_of_range_raise(change: dict[str, object], text: str) -> None:
    given: dict[str, object] = {"mask": mask_of((50, 50), (1, 1, 5, 5)), "resolution": 16} | change
    with pytest.raises(ValueError, match=text):
        crop_boxes(given.pop("mask"), given.pop("resolution"), **given)  # type: ignore[arg-type]
