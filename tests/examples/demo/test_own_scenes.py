"""Scenes of one's own photographs: the object is covered, its effects are not, the rest stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.interpolate import BPoly
from skimage import data

import make_data
import own_scenes
from mask_shapes import OWN_MASK_KINDS, closed_bezier, cover_as
from own_scenes import OwnScenes, compose_own, load_cutout, place, reflect
from removal_data.checks.report import add_contents, start_report
from removal_data.options import DataOptions
from scenes import MASK_KINDS, Scene

SIZE = 128


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write photographs, one of them turned by its EXIF data, and two cut-outs."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("photographs/more", "objects"):
        (folder / name).mkdir(parents=True)
    exif = Image.Exif()
    exif[274] = 6
    for name in ("coffee", "chelsea", "rocket"):
        image = Image.fromarray(getattr(data, name)())
        image.save(folder / "photographs" / "more" / f"{name}.jpg", exif=exif.tobytes())
    Image.fromarray(data.astronaut()).save(folder / "photographs" / "astronaut.png")
    ys, xs = np.mgrid[:100, :160]
    for name, shape in (
        ("disk", np.hypot(ys - 50, xs - 80) < 40),
        ("bar", (np.abs(ys - 50) < 45) & (np.abs(xs - 60) < 12)),
    ):
        pixels = np.dstack([np.full_like(ys, value) for value in (200, 60, 30)] + [255 * shape])
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "objects" / f"{name}.png")
    return folder / "photographs", folder / "objects"


@pytest.fixture(scope="module")
def many(folders: tuple[Path, Path]) -> list[Scene]:
    own = OwnScenes(*folders)
    return [own.draw(rng(seed), "train", SIZE, OWN_MASK_KINDS[seed % 3]) for seed in range(18)]


def test_masks_cover_the_object_and_leave_shadows(many: list[Scene]) -> None:
    left = []
    for scene in many:
        assert scene.mask[scene.alpha > 0.02].min() == 1
        assert set(np.unique(scene.mask)) <= {0.0, 1.0}
        visible = scene.shadow * (1 - scene.alpha)
        left.append(float((visible * (1 - scene.mask)).sum() / visible.sum()))
    assert np.mean(left) > 0.3


def test_sources_are_composed_as_documented(many: list[Scene]) -> None:
    for scene in many:
        assert scene.src.dtype == scene.mask.dtype == np.float32
        assert scene.src.shape == (SIZE, SIZE, 3)
        outside = scene.alpha == 0
        np.testing.assert_allclose(scene.src[outside], scene.shadowed[outside], atol=1e-6)
        full = scene.alpha == 1
        assert np.abs(scene.src - scene.result)[full].mean() > 0.03
        assert 0 <= scene.src.min() <= scene.src.max() <= 1


def test_far_from_object_and_effects_nothing_changes(many: list[Scene]) -> None:
    for scene in many:
        changed = np.abs(scene.src - scene.result).max(2) > 1e-6
        effect = changed & (scene.alpha == 0) & (scene.shadow == 0)
        columns = np.flatnonzero((scene.alpha > 0.02).any(0))
        foot = np.flatnonzero((scene.alpha > 0.02).any(1))[-1]
        rows, where = np.nonzero(effect)
        # What is neither object nor shadow is a reflection: below the object.
        if len(rows):
            assert rows.min() >= foot - 1
            assert where.min() >= columns[0] - 6
            assert where.max() <= columns[-1] + 6
    assert any((np.abs(s.src - s.result).max(2) < 1e-6).mean() > 0.3 for s in many)


def test_some_scenes_have_reflections() -> None:
    alpha = np.zeros((64, 64), np.float32)
    alpha[20:40, 10:20] = 1
    rgb = np.zeros((64, 64, 3), np.float32)
    rgb[20:40, :, 0] = np.linspace(0, 1, 20)[:, None]
    mirrored, strength = reflect(rng(), rgb, alpha, 40)
    np.testing.assert_array_equal(mirrored[40:60], rgb[20:40][::-1])
    assert strength[:40].max() == 0
    below = strength[41:50, 15]
    assert (np.diff(below) < 0).all()
    assert 0.1 < below[0] < 0.41


def test_objects_are_placed_on_their_foot() -> None:
    colors, alpha = np.full((40, 20, 3), 0.5, np.float32), np.ones((40, 20), np.float32)
    rgb, matte = place((colors, alpha), 64, (50, 30), 20)
    rows, columns = np.flatnonzero(matte.any(1)), np.flatnonzero(matte.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (30, 49, 25, 34)
    np.testing.assert_allclose(rgb[matte > 0], 0.5, atol=0.01)
    _, cut = place((colors, alpha), 64, (64, 0), 40)
    assert cut[24:, :10].all()
    assert cut.sum() == 40 * 10


def test_transparent_colors_do_not_bleed_into_a_smaller_object(tmp_path: Path) -> None:
    pixels = np.zeros((200, 200, 4), np.uint8)
    pixels[..., 1] = 255  # green, where it is transparent
    pixels[50:150, 50:150] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rgb, matte = place(load_cutout(tmp_path / "a.png"), 64, (40, 32), 11)
    assert rgb[..., 1][matte > 0.02].max() < 0.03


def test_the_light_comes_from_one_side(many: list[Scene]) -> None:
    alpha = np.zeros((SIZE, SIZE), np.float32)
    alpha[40:80, 40:80] = 1
    rgb = np.full((SIZE, SIZE, 3), 0.4, np.float32)
    background = np.full_like(rgb, 0.4)
    right = own_scenes.relight(rng(), rgb, alpha, background, 0.8)
    left = own_scenes.relight(rng(), rgb, alpha, background, -0.8)
    assert right[60, 78, 0] > right[60, 42, 0]
    assert left[60, 78, 0] < left[60, 42, 0]
    bright = own_scenes.relight(rng(), rgb, alpha, 2 * background, 0.8)
    assert bright[40:80, 40:80].mean() > 1.1 * right[40:80, 40:80].mean()


def test_the_curve_is_that_of_bernstein_polynomials_through_its_points() -> None:
    points = rng().uniform(0, 10, (5, 2))
    curve = closed_bezier(points, steps=4)
    np.testing.assert_allclose(curve[::4], points)
    tangents = (np.roll(points, -1, 0) - np.roll(points, 1, 0)) / 2
    controls = [points[1], points[1] + tangents[1] / 3, points[2] - tangents[2] / 3, points[2]]
    segment = BPoly(np.array(controls)[:, None], [0, 1])
    np.testing.assert_allclose(curve[4:8], segment([0, 0.25, 0.5, 0.75]))


@pytest.mark.parametrize("kind", [*OWN_MASK_KINDS, *MASK_KINDS])
def test_masks_stay_near_the_object(kind: str) -> None:
    alpha = np.zeros((SIZE, SIZE), np.float32)
    alpha[40:90, 50:80] = 1
    distance = ndimage.distance_transform_edt(alpha == 0)
    areas = set()
    for seed in range(12):
        mask = cover_as(rng(seed), alpha, kind)
        assert mask[alpha > 0].min() == 1
        assert distance[mask > 0].max() < 30
        areas.add(mask.sum())
    assert min(areas) > alpha.sum()
    assert len(areas) > 2


def test_a_dilation_is_even_all_around() -> None:
    alpha = np.zeros((SIZE, SIZE), np.float32)
    alpha[40:90, 50:80] = 1
    distance = ndimage.distance_transform_edt(alpha == 0)
    mask = cover_as(rng(), alpha, "dilated") > 0
    assert distance[mask].max() < distance[~mask].min()


def test_the_command_writes_sound_data_split_by_photograph(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--output_dir", str(tmp_path / "out"), "--size", "128"]
    flags += ["--photographs", str(folders[0]), "--objects", str(folders[1])]
    flags += ["--train_count", "6", "--test_count", "3"]
    make_data.main(flags)
    told = {}
    for split, count in (("train", 6), ("test", 3)):
        report = start_report(tmp_path / "out" / split, DataOptions())
        add_contents(report, DataOptions())
        assert len(report.usable) == count
        assert [finding.text for finding in report.findings] == []
        lines = (tmp_path / "out" / split / "metadata.jsonl").read_text().splitlines()
        told[split] = [json.loads(line) for line in lines]
    assert [entry["mask"] for entry in told["train"]] == list(OWN_MASK_KINDS) * 2
    used = [{entry["photograph"] for entry in entries} for entries in told.values()]
    assert not used[0] & used[1]
    path = tmp_path / "out" / "train" / "src" / "0000.png"
    written = path.stat().st_mtime_ns
    make_data.main(flags)
    assert path.stat().st_mtime_ns == written
    make_data.main([*flags, "--mask_kinds", "stroke"])
    lines = (tmp_path / "out" / "train" / "metadata.jsonl").read_text().splitlines()
    assert {json.loads(line)["mask"] for line in lines} == {"stroke"}


def test_a_foreign_folder_is_refused(folders: tuple[Path, Path]) -> None:
    flags = ["--output_dir", str(folders[0]), "--photographs", str(folders[0])]
    with pytest.raises(FileExistsError, match="holds other files"):
        make_data.main([*flags, "--objects", str(folders[1])])


def test_what_cannot_be_composed_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected images"):
        OwnScenes(folders[0], tmp_path)
    with pytest.raises(ValueError, match=r"Expected .*astronaut\.png to be a cut-out"):
        OwnScenes(folders[0], folders[0])
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match=r"Expected an object in .*clear\.png"):
        OwnScenes(folders[0], tmp_path)
    with pytest.raises(ValueError, match="two or more photographs"):
        OwnScenes(tmp_path, folders[1])


@pytest.mark.parametrize("flags", [["--photographs", "a"], ["--mask_kinds", "box"]])
def test_flags_that_need_others_end_the_program(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        make_data.main(["--output_dir", "out", *flags])


def test_the_same_seed_gives_the_same_scene(folders: tuple[Path, Path]) -> None:
    own = OwnScenes(*folders)
    first, again, other = (own.draw(rng(seed), "test", 64, "bezier").src for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_tall_and_wide_objects_fit() -> None:
    for shape in ((200, 20), (20, 200)):
        cutout = (np.full((*shape, 3), 0.9, np.float32), np.ones(shape, np.float32))
        background = np.full((64, 64, 3), 0.3, np.float32)
        for seed in range(10):
            scene = compose_own(rng(seed), background, background, cutout, "box")
            assert scene.alpha.sum() > 10
