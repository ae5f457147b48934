"""Samples are found in every layout, and what is incomplete is named."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import train
from options.parsing import parse_options
from removal_data.batches import BucketBatches
from removal_data.dataset import RemovalDataset
from removal_data.sources.layouts import find_samples
from removal_data.sources.samples import raise_first

COLORS = {"src": (200, 0, 0), "mask": 255, "result": (0, 200, 0), "ref": (0, 0, 200)}


def write(path: Path, part: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if part == "mask" else "RGB", (48, 32), COLORS[part]).save(path)
    return str(path)


def names(source: str | Path) -> list[str]:
    samples, findings = find_samples(source)
    assert findings == []
    for sample in samples:
        for part, path in sample.files.items():
            pixel = Image.open(path).getpixel((0, 0))
            assert pixel == COLORS[part], (part, path)
    return [sample.name for sample in samples]


def test_nested_folders(tmp_path: Path) -> None:
    for part in COLORS:
        for name in ("a.png", "day/a.png", "day/sea/b.png", ".cache/c.png"):
            write(tmp_path / part / name, part)
    assert names(tmp_path) == ["a", "day/a", "day/sea/b"]


def test_composed_and_decomposed_names_are_the_same(tmp_path: Path) -> None:
    name = "Küste-é"
    assert unicodedata.normalize("NFD", name) != name
    for part, form in zip(COLORS, ("NFC", "NFD", "NFC", "NFD"), strict=True):
        write(tmp_path / part / f"{unicodedata.normalize(form, name)}.png", part)
    assert names(tmp_path) == [name]


@pytest.mark.parametrize(
    ("src", "mask", "result"),
    [
        ("a", "a_mask", "a"),
        ("a_src", "a_mask", "a_result"),
        ("a_F", "a_M", "a_G"),
        ("a_mask", "a_mask", "a_mask"),
    ],
)
def test_endings_inside_of_folders(tmp_path: Path, src: str, mask: str, result: str) -> None:
    for part, name in (("src", src), ("mask", mask), ("result", result)):
        write(tmp_path / part / f"{name}.png", part)
    assert names(tmp_path) == [src]


@pytest.mark.parametrize(
    "endings", [("_F", "_M", "_G"), ("", "_mask", "_gt"), ("_src", "_mask", "_result")]
)
def test_endings_in_one_folder(tmp_path: Path, endings: tuple[str, str, str]) -> None:
    for part, ending in zip(COLORS, endings, strict=False):
        for name in ("a", "day/b"):
            write(tmp_path / f"{name}{ending}.png", part)
    assert names(tmp_path) == ["a", "day/b"]


def test_a_missing_file_of_endings_is_named(tmp_path: Path) -> None:
    for part, ending in zip(COLORS, ("", "_mask", "_result"), strict=False):
        for name in ("a", "b"):
            write(tmp_path / f"{name}{ending}.png", part)
    (tmp_path / "b_mask.png").unlink()
    samples, findings = find_samples(tmp_path)
    assert [sample.name for sample in samples] == ["a"]
    with pytest.raises(FileNotFoundError, match=r"'b' has no `mask`: expected .*/b_mask\.\*"):
        raise_first(findings)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Write a manifest of two masks of one image, with one target, and of another sample."""
    for part in ("src", "mask", "result"):
        write(tmp_path / "files" / part / "a.png", part)
        write(tmp_path / "files" / part / "b.png", part)
    write(tmp_path / "files" / "mask" / "c.jpg", "mask")
    rows = [
        {"src": "a", "mask": "a.png", "result": "a", "caption": "the sea", "repeats": 3},
        {"src": "a", "mask": "c.jpg", "result": "a", "weight": 0.5},
        {"src": "b", "mask": "b.png", "result": "a", "caption": "a wall", "name": "mine"},
    ]
    for row in rows:
        row |= {p: f"files/{p}/{row[p]}" for p in ("src", "mask", "result")}
        row |= {p: f"{row[p]}.png" for p in ("src", "result")}
    path = tmp_path / "manifest.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    return path


def test_a_manifest_shares_files_and_has_captions_repeats_and_weights(manifest: Path) -> None:
    assert names(manifest) == names(manifest.parent) == ["files/src/a", "files/src/a-2", "mine"]
    samples, _ = find_samples(manifest)
    assert {sample.files["result"].name for sample in samples} == {"a.png"}
    assert [sample.share for sample in samples] == [3, 0.5, 1]
    dataset = RemovalDataset(manifest)
    assert dataset.captions == ["the sea", "a wall"]
    assert [int(dataset[index]["caption"]) for index in range(3)] == [0, -1, 1]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "JSON in line 2"),
        ("[]", "line 2 of .* to be a JSON object"),
        ('{"src": "a", "mask": "a"}', "line 2 of .* to have src, mask and result"),
        ('{"src": "a", "mask": "a", "result": "a", "target": "a"}', "line 2"),
        ('{"src": "a", "mask": "a", "result": "a", "repeats": "2"}', "`repeats` of another type"),
        ('{"src": "a", "mask": "a", "result": "a", "repeats": 0}', "`repeats` >= 1"),
        ('{"src": "a", "mask": "a", "result": "a", "weight": NaN}', "`weight` > 0"),
    ],
)
def test_a_wrong_line_of_a_manifest_is_named(manifest: Path, line: str, told: str) -> None:
    first = manifest.read_text().splitlines()[0]
    manifest.write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=told):
        find_samples(manifest)


def test_a_missing_file_of_a_manifest_is_named(manifest: Path) -> None:
    (manifest.parent / "files" / "mask" / "c.jpg").unlink()
    samples, findings = find_samples(manifest)
    assert len(samples) == 2
    with pytest.raises(
        FileNotFoundError, match=r"`mask`: line 3 of .*manifest.jsonl names .*c.jpg"
    ):
        raise_first(findings)


def test_an_empty_manifest_is_an_error(manifest: Path) -> None:
    manifest.write_text("\n")
    with pytest.raises(FileNotFoundError, match="no lines"):
        find_samples(manifest)


def dealt(shares: list[float], epochs: int, **further: Any) -> list[Counter[int]]:
    deal = BucketBatches([(64, 64)] * len(shares), 2, seed=0, shares=shares, **further)
    return [Counter(i for batch in deal.epoch(n) for i in batch) for n in range(epochs)]


def test_samples_are_dealt_by_their_shares() -> None:
    shares = [3.0, 0.5, 1.0, 0.25, 0.25]
    epochs = dealt(shares, 400)
    assert {sum(counts.values()) for counts in epochs} == {5}
    assert {counts[0] for counts in epochs} == {3}
    assert {counts[2] for counts in epochs} == {1}
    for index in (1, 3, 4):
        mean = sum(counts[index] for counts in epochs) / 400
        assert mean == pytest.approx(shares[index], abs=0.1)
        assert {counts[index] for counts in epochs} == {0, 1}


def test_a_run_with_shares_can_be_taken_up_anywhere() -> None:
    shares = [2.0, 0.5, 0.5, 1.0]
    whole = BucketBatches([(64, 64)] * 4, 2, seed=0, shares=shares)
    rest = BucketBatches([(64, 64)] * 4, 2, seed=0, shares=shares, start=5)
    assert list(islice(whole, 12))[5:] == list(islice(rest, 7))


def test_a_run_reads_a_manifest_and_says_that_its_captions_are_not_used(
    arguments: Callable[..., list[str]], manifest: Path, tmp_path: Path
) -> None:
    flags = arguments(train_data_dir=manifest, batch_size=1)
    assert train.train(parse_options(flags)).is_dir()
    log = (tmp_path / "logs" / "training.log").read_text()
    assert "captions of the data are not used: the model reads no texts" in log


@pytest.fixture
def image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a Hugging Face image folder with three images a row."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, rows = tmp_path / "images", []
    for name in ("a", "b"):
        for part in ("src", "mask", "result"):
            write(folder / part / f"{name}.png", part)
        files = {f"{p}_file_name": f"{p}/{name}.png" for p in ("src", "mask", "result")}
        rows.append(files | {"caption": f"of {name}", "repeats": 2})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def test_a_hugging_face_image_folder(image_folder: Path) -> None:
    assert names(f"datasets:{image_folder}") == ["0000000", "0000001"]
    samples, _ = find_samples(f"datasets:{image_folder}")
    assert [sample.caption for sample in samples] == ["of a", "of b"]
    assert {sample.repeats for sample in samples} == {2}


def test_hugging_face_parquet_files_give_the_same(image_folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset(str(image_folder), split="train")
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train-00000.parquet"))
    source = f"datasets:{tmp_path / 'parquet'}"
    assert names(source) == ["0000000", "0000001"]
    first = RemovalDataset(f"datasets:{image_folder}")[1]
    second = RemovalDataset(source)[1]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_columns_of_a_hugging_face_data_set_are_refused(image_folder: Path) -> None:
    rows = (image_folder / "metadata.jsonl").read_text().replace("result_file", "target_file")
    (image_folder / "metadata.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"row 0 of .* to have src, mask and result"):
        find_samples(f"datasets:{image_folder}")
