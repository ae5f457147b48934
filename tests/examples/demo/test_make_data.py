"""The command writes what the demonstration has always had, and kinds of removal by name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kinds
import make_data
import scenes
from removal_data.dataset import RemovalDataset
from scenes import MASK_KINDS, Scene


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def assert_is(folder: Path, stem: str, scene: Scene) -> None:
    for name in ("src", "mask", "result", "ref"):
        expected = np.round(getattr(scene, name) * 255).astype(np.uint8)
        np.testing.assert_array_equal(pixels(folder / name / f"{stem}.png"), expected)


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_by_default_the_data_are_the_scenes_of_the_demonstration(tmp_path: Path) -> None:
    out = tmp_path / "data"
    flags = ["--output_dir", str(out), "--train_count", "4", "--test_count", "2", "--size", "64"]
    make_data.main(flags)
    for split, seed, count in (("train", 11, 4), ("test", 12, 2)):
        for index in range(count):
            rng = np.random.default_rng((seed, index))
            scene = scenes.random_scene(rng, split, 64, mask_kind=MASK_KINDS[index % 3])
            assert_is(out / split, f"{index:04d}", scene)
        assert not (out / split / "manifest.jsonl").exists()
        keys = {"stem", "photograph", "object", "mask", "area"}
        assert all(set(row) == keys for row in rows(out / split / "metadata.jsonl"))
    assert RemovalDataset(out / "train").kinds == []
    assert "kind" not in RemovalDataset(out / "train")[0]


def test_kinds_take_turns_and_the_manifest_names_them(tmp_path: Path) -> None:
    out, wanted = tmp_path / "data", ["glow", "text", "stain"]
    flags = ["--output_dir", str(out), "--train_count", "9", "--test_count", "3", "--size", "64"]
    make_data.main([*flags, "--kinds", *wanted])
    found = rows(out / "train" / "manifest.jsonl")
    assert Counter(row["kind"] for row in found) == dict.fromkeys(wanted, 3)
    told = rows(out / "train" / "metadata.jsonl")
    pairs = {(row["kind"], row["mask"]) for row in told}
    assert pairs == {(kind, mask) for kind in wanted for mask in MASK_KINDS}
    dataset = RemovalDataset(out / "train")
    assert dataset.kinds == wanted
    assert dataset.stems == [f"{index:04d}" for index in range(9)]
    for index in (0, 4, 8):
        kind, rng = wanted[index % 3], np.random.default_rng((11, index))
        mask_kind = MASK_KINDS[index // 3]
        scene = kinds.random_kind_scene(rng, "train", 64, kind=kind, mask_kind=mask_kind)
        assert_is(out / "train", f"{index:04d}", scene)
        assert dataset.kinds[int(dataset[index]["kind"])] == kind


def test_other_kinds_write_anew_and_none_leave_no_manifest(tmp_path: Path) -> None:
    out = tmp_path / "data"
    flags = ["--output_dir", str(out), "--train_count", "2", "--test_count", "1", "--size", "64"]
    make_data.main([*flags, "--kinds", "glow"])
    manifest = out / "train" / "manifest.jsonl"
    written = manifest.stat().st_mtime_ns
    make_data.main([*flags, "--kinds", "glow"])
    assert manifest.stat().st_mtime_ns == written
    make_data.main([*flags, "--kinds", "text"])
    assert {row["kind"] for row in rows(manifest)} == {"text"}
    make_data.main(flags)
    assert not manifest.exists()
    assert not (out / "test" / "manifest.jsonl").exists()


def test_unknown_kinds_end_the_program(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        make_data.main(["--output_dir", str(tmp_path), "--kinds", "fog"])


def test_own_objects_come_in_kinds_too(tmp_path: Path) -> None:
    photographs, objects = tmp_path / "photographs", tmp_path / "objects"
    photographs.mkdir()
    objects.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(120, 220, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 120)).save(photographs / f"{index}.png")
    cutout = np.zeros((40, 30, 4), np.uint8)
    cutout[4:36, 4:26] = (200, 40, 40, 255)
    Image.fromarray(cutout).save(objects / "box.png")
    flags = ["--output_dir", str(tmp_path / "out"), "--photographs", str(photographs)]
    flags += ["--objects", str(objects), "--train_count", "5", "--test_count", "1", "--size", "64"]
    make_data.main([*flags, "--kinds", *kinds.KINDS])
    told = rows(tmp_path / "out" / "train" / "metadata.jsonl")
    assert [row["kind"] for row in told] == list(kinds.KINDS)
    used = {row["kind"]: row["object"] for row in told}
    assert used["shadow"] == used["reflection"] == used["stain"] == "box.png"
    assert used["glow"] != "box.png" != used["text"]
