"""Buckets have the right size, batches are full, and crops hold the mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import train
from options.parsing import parse_options
from removal_data.batches import image_sizes
from removal_data.buckets import assign_buckets, bucket_sizes
from removal_data.cropping import crop_window, mask_box, scale_mask, share_outside
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions

ODD = [(601, 400), (640, 427), (400, 603), (500, 500), (512, 511), (800, 450)]
ODD += [(450, 801), (333, 500), (599, 401), (480, 640), (641, 480), (700, 500)]


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (512, 16), (256, 64), (1024, 128)])
def test_buckets_are_as_large_as_allowed(resolution: int, step: int) -> None:
    found = bucket_sizes(resolution, step)
    assert (resolution, resolution) in found
    for width, height in found:
        assert width % step == height % step == 0
        assert width * height <= resolution**2 < width * (height + step)
        assert 0.5 <= width / height <= 2
    assert {(height, width) for width, height in found} >= {(resolution, resolution)}


def test_a_sample_gets_the_bucket_of_its_aspect_ratio() -> None:
    options = DataOptions(resolution=512)
    sizes = [(4032, 3024), (3024, 4032), (300, 300), (2000, 500)]
    found = assign_buckets(sizes, options, batch_size=1)
    assert found[0] == (576, 448)
    assert found[2] == (512, 512)
    assert found[1][0] < found[1][1]
    assert found[3][0] / found[3][1] == max(w / h for w, h in bucket_sizes(512, 64))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_twelve_odd_sizes_fill_batches(batch_size: int) -> None:
    found = assign_buckets(ODD, DataOptions(resolution=512), batch_size=batch_size)
    assert min(Counter(found).values()) >= batch_size
    for (width, height), bucket in zip(ODD, found, strict=True):
        ratio = (width / height) / (bucket[0] / bucket[1])
        assert 1 / 1.7 < ratio < 1.7


def test_extreme_samples_are_not_cropped_to_fill_a_batch() -> None:
    sizes = [(512, 512)] * 4 + [(1024, 512)]
    found = assign_buckets(sizes, DataOptions(resolution=512), batch_size=4)
    assert found[:4] == [(512, 512)] * 4
    assert found[4] != (512, 512)


@given(
    st.tuples(st.integers(20, 3000), st.integers(20, 3000)),
    st.sampled_from([(64, 64), (512, 512), (704, 320), (320, 704)]),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.none() | st.floats(0, 3),
)
def test_windows_are_inside_have_the_aspect_ratio_and_hold_the_mask(
    size: tuple[int, int],
    bucket: tuple[int, int],
    place: tuple[float, float, float, float],
    context: float | None,
) -> None:
    left, right = sorted(round(part * (size[0] - 1)) for part in place[:2])
    top, bottom = sorted(round(part * (size[1] - 1)) for part in place[2:])
    box = (float(left), float(top), float(right + 1), float(bottom + 1))
    window = crop_window(size, bucket, box, context=context)
    assert window[0] >= 0
    assert window[1] >= 0
    assert window[2] <= size[0]
    assert window[3] <= size[1]
    width, height = window[2] - window[0], window[3] - window[1]
    assert width / height == pytest.approx(bucket[0] / bucket[1], rel=1e-6)
    for axis, side in enumerate((width, height)):
        length = box[axis + 2] - box[axis]
        if length <= side:
            assert window[axis] <= box[axis] + 1e-6
            assert window[axis + 2] >= box[axis + 2] - 1e-6
        else:
            assert box[axis] - 1e-6 <= window[axis]
            assert window[axis + 2] <= box[axis + 2] + 1e-6
    fits = min(size[0] / bucket[0], size[1] / bucket[1])
    if context is None:
        assert width == pytest.approx(fits * bucket[0])
    elif fits >= 1:
        assert width >= bucket[0] - 1e-6  # no more pixels than the file has are invented


def test_context_is_counted_in_sides_of_the_mask() -> None:
    window = crop_window((4000, 3000), (64, 64), (1000, 1000, 1400, 1200), context=0.25)
    assert window == (900, 800, 1500, 1400)


def test_scaled_masks_cover_what_they_covered() -> None:
    mask = np.zeros((500, 700), dtype=bool)
    mask[250, 100:600] = True  # one pixel thin
    found = scale_mask(mask, (70, 50), (0, 0, 700, 500))
    assert found[25, 10:60].all()
    assert found.sum() == 50
    assert share_outside(mask, (0, 0, 350, 500)) == 0.5
    assert mask_box(mask) == (100, 250, 600, 251)
    assert mask_box(mask & False) is None


def write(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    for index, (width, height) in enumerate(sizes):
        ys, xs = np.mgrid[:height, :width]
        ramp = np.stack([255 * xs / width, 255 * ys / height, 0 * xs], axis=2)
        mask = np.zeros((height, width), dtype=bool)
        mask[height // 2 : height // 2 + 20, -40:-10] = True
        images = {"src": np.where(mask[..., None], 255, ramp), "result": ramp, "mask": 255 * mask}
        for part, values in images.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(folder / part / f"{index:02d}.png")
    return folder


def test_items_are_scaled_and_cropped_around_the_mask(tmp_path: Path) -> None:
    folder = write(tmp_path, [(640, 200), (200, 333)])
    dataset = RemovalDataset(folder, reading=DataOptions(resolution=128, bucket_step=32))
    for item, (width, height) in zip(dataset, image_sizes(dataset), strict=False):
        assert item["src"].shape == (3, height, width)
        assert item["mask"].shape == (1, height, width)
        inside = item["mask"][0] > 0
        assert inside.any()
        # The object is white, and the blue channel of the rest is black; scaling blurs the edge.
        near = torch.nn.functional.max_pool2d(item["mask"], 7, 1, 3)[0] > 0
        assert item["src"][2][~near].max() < 0.05
        assert item["src"][2][inside].mean() > 0.6
        assert item["result"][2].max() < 0.05
    # The wide image is cropped to its right end, where the mask is.
    assert dataset[0]["result"][0, 0, 0] > 0.4


def test_context_enlarges_small_objects(tmp_path: Path) -> None:
    folder = write(tmp_path, [(1024, 1024)])
    areas = [
        RemovalDataset(folder, reading=DataOptions(resolution=128, crop_context=context))[0][
            "mask"
        ].mean()
        for context in (None, 1.0)
    ]
    assert areas[1] > 20 * areas[0]


def test_references_may_have_any_size(tmp_path: Path) -> None:
    folder = write(tmp_path, [(200, 200)])
    (folder / "ref").mkdir()
    Image.new("RGB", (90, 50), (255, 0, 0)).save(folder / "ref" / "00.png")
    item = RemovalDataset(folder, reading=DataOptions(resolution=64))[0]
    assert torch.equal(item["ref"], torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 64, 64))


def test_twelve_odd_photographs_train(
    arguments: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "data", ODD)
    flags = arguments(train_data_dir=folder, resolution=64, bucket_step=16, batch_size=4)
    assert train.train(parse_options(flags)).is_dir()
    with pytest.raises(ValueError, match="--resolution"):
        train.train(parse_options(arguments(train_data_dir=folder, output_dir=tmp_path / "b")))
