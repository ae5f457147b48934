from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from skimage.measure import euler_number, label
from torch import Tensor

from moe_lora.masks import analyze
from moe_lora.masks.analysis.topology import connected_labels

SIZE = (96, 96)


def spiral(size: int) -> NDArray[np.bool_]:
    """Draw a path of one cell that winds inwards, with one free cell between its turns."""
    path = np.zeros((size, size), bool)
    y, x, dy, dx = 0, 0, 0, 1
    path[0, 0] = True

    def blocked(y: int, x: int, dy: int, dx: int) -> bool:
        ahead, beyond = (y + dy, x + dx), (y + 2 * dy, x + 2 * dx)
        outside = not (0 <= ahead[0] < size and 0 <= ahead[1] < size)
        if outside or path[ahead]:
            return True
        return 0 <= beyond[0] < size and 0 <= beyond[1] < size and bool(path[beyond])

    while True:
        if blocked(y, x, dy, dx):
            dy, dx = dx, -dy
            if blocked(y, x, dy, dx):
                return path
        y, x = y + dy, x + dx
        path[y, x] = True


def serpentine(size: int) -> NDArray[np.bool_]:
    path = np.zeros((size, size), bool)
    path[::2] = True
    path[1::4, -1] = True
    path[3::4, 0] = True
    return path


def assert_same_parts(occupied: NDArray[np.bool_]) -> None:
    labels = connected_labels(torch.from_numpy(occupied)[None])[0].numpy().reshape(occupied.shape)
    for where, connectivity in ((occupied, 2), (~occupied, 1)):
        parts, count = label(where, connectivity=connectivity, return_num=True)
        pairs = set(zip(labels[where].tolist(), parts[where].tolist(), strict=True))
        assert len(pairs) == len({ours for ours, _ in pairs}) == count


@pytest.mark.parametrize("share", [0.2, 0.41, 0.5, 0.59, 0.8])
def test_labels_agree_with_skimage_on_noise(share: float) -> None:
    generator = np.random.default_rng(0)
    for _ in range(3):
        assert_same_parts(generator.random((66, 50)) < share)


@pytest.mark.parametrize("draw", [spiral, serpentine])
def test_labels_follow_long_paths(draw: Callable[[int], NDArray[np.bool_]]) -> None:
    path = draw(66)
    for turned in (path, path[::-1, ::-1], path.T, ~path):
        assert_same_parts(np.ascontiguousarray(turned))


def test_occlusion_of_random_blobs_agrees_with_skimage(blobs: Callable[..., Tensor]) -> None:
    masks = blobs(24, 62, 7.0)
    got = analyze(masks).has_occlusion.tolist()
    expected, judged = [], []
    for index, mask in enumerate(masks[:, 0].numpy() > 0.5):
        parts, count = label(mask, connectivity=2, return_num=True)
        rest = label(np.pad(~mask, 1, constant_values=True), connectivity=1)
        sizes = np.bincount(parts.ravel())[1:]
        enclosed = ((rest != 0) & (rest != rest[0, 0])).sum()
        assert count - euler_number(mask, connectivity=2) == rest.max() - 1
        expected.append(
            bool(mask.sum() - sizes.max() >= 0.02 * mask.sum() or enclosed >= 0.02 * mask.sum())
        )
        judged.append(got[index])
    assert judged == expected
    assert 3 < sum(expected) < 24


def test_ring_beside_a_disk_is_seen(disk: Callable[..., Tensor]) -> None:
    """One hole and two parts cancel in the Euler number; here they must not."""
    ring = disk(SIZE, 30, 30, 20) - disk(SIZE, 30, 30, 10)
    both = ring + disk(SIZE, 70, 70, 12)
    assert euler_number(both.numpy() > 0.5, connectivity=2) == 1
    assert analyze(both[None, None]).has_occlusion.tolist() == [True]


def test_parts_and_holes(disk: Callable[..., Tensor], comb: Callable[..., Tensor]) -> None:
    whole = disk(SIZE, 48, 48, 40)
    half_ring = disk(SIZE, 0, 48, 40) - disk(SIZE, 0, 48, 20)
    cases = {
        "disk": (whole, False),
        "ring": (whole - disk(SIZE, 48, 48, 10), True),
        "two disks": (disk(SIZE, 25, 48, 20) + disk(SIZE, 72, 48, 20), True),
        "comb": (comb(96, 6), False),
        "hole of 0.6 %": (whole - disk(SIZE, 48, 48, 3), False),
        "crumb of 0.6 %": (whole + disk(SIZE, 92, 92, 3), False),
        "bay closed by the border": (half_ring, False),
        "one pixel": (disk(SIZE, 20.5, 20.5, 0.6), False),
        "empty": (torch.zeros(SIZE), False),
        "full": (torch.ones(SIZE), False),
        "gray below a half": (torch.full(SIZE, 0.4), False),
        "frame": (1 - disk(SIZE, 48, 48, 30), True),
    }
    masks = torch.stack([mask for mask, _ in cases.values()])[:, None]
    got = dict(zip(cases, analyze(masks).has_occlusion.tolist(), strict=True))
    assert got == {name: expected for name, (_, expected) in cases.items()}


@pytest.mark.parametrize("factor", [2, 5])
def test_occlusion_does_not_change_with_scale(disk: Callable[..., Tensor], factor: int) -> None:
    size = (60, 100)
    ring = disk(size, 50, 30, 25) - disk(size, 50, 30, 8)
    masks = torch.stack([ring, disk(size, 50, 30, 25)])[:, None]
    large = masks.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    assert analyze(large).has_occlusion.tolist() == [True, False]


def test_thin_strokes_hold_together(disk: Callable[..., Tensor]) -> None:
    stroke = torch.eye(512)
    loop = disk((512, 512), 256, 256, 220) - disk((512, 512), 256, 256, 218)
    masks = torch.stack([stroke, loop])[:, None]
    assert analyze(masks).has_occlusion.tolist() == [False, True]


def test_area_beyond_the_border_does_not_count() -> None:
    """The second part is 5 % of the mask, but would be crumbs beside a band carried on outside."""
    mask = torch.zeros(1, 1, 96, 96)
    mask[..., :3, :] = 1
    mask[..., 6:10, 40:44] = 1
    assert analyze(mask).has_occlusion.tolist() == [True]
