"""The data set reads what is there and names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import make_data as make_data_module
import train
from image_io.options import ReadingOptions
from make_data import make_data
from options.parsing import parse_options
from removal_data.batches import image_sizes
from removal_data.checks import before_training
from removal_data.dataset import RemovalDataset
from removal_data.options import DataOptions

SIZE = (32, 48)

FLIP = Image.Transpose
STORED_AS = {
    **{2: FLIP.FLIP_LEFT_RIGHT, 3: FLIP.ROTATE_180, 4: FLIP.FLIP_TOP_BOTTOM, 5: FLIP.TRANSPOSE},
    **{6: FLIP.ROTATE_90, 7: FLIP.TRANSVERSE, 8: FLIP.ROTATE_270},
}
"""How what is shown was stored, by the EXIF standard's table of row 0 and column 0."""


def write(path: Path, value: int = 128, size: tuple[int, int] = SIZE, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size[1], size[0]), value if mode == "L" else (value,) * 3).save(path)


def write_turned(path: Path, shown: np.ndarray, orientation: int) -> None:
    """Write a file that a viewer shows upright by its EXIF orientation."""
    exif = Image.Exif()
    exif[274] = orientation
    stored = Image.fromarray(shown)
    if orientation > 1:
        stored = stored.transpose(STORED_AS[orientation])
    stored.save(path, exif=exif.tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, stem in enumerate(("a", "b")):
        write(tmp_path / "src" / f"{stem}.png", 51 + number)
        write(tmp_path / "mask" / f"{stem}.png", 255, mode="L")
        write(tmp_path / "result" / f"{stem}.webp", 102)
        write(tmp_path / "ref" / f"{stem}.jpg", 204)
    return tmp_path


def test_reads_non_square_samples_in_order_of_their_stems(folder: Path) -> None:
    data = RemovalDataset(folder)
    assert len(data) == 2
    item = data[1]
    assert {name: tuple(x.shape) for name, x in item.items()} == {
        "src": (3, *SIZE),
        "mask": (1, *SIZE),
        "result": (3, *SIZE),
        "ref": (3, *SIZE),
    }
    assert all(x.dtype == torch.float32 for x in item.values())
    torch.testing.assert_close(item["src"], torch.full((3, *SIZE), 52 / 255))
    torch.testing.assert_close(item["mask"], torch.ones(1, *SIZE))
    torch.testing.assert_close(item["result"], torch.full((3, *SIZE), 0.4), atol=0.01, rtol=0)
    torch.testing.assert_close(item["ref"], torch.full((3, *SIZE), 0.8), atol=0.01, rtol=0)


def test_channels_and_rows_are_where_they_belong(folder: Path) -> None:
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    image[2, 5] = (255, 0, 51)
    Image.fromarray(image).save(folder / "src" / "a.png")
    src = RemovalDataset(folder)[0]["src"]
    torch.testing.assert_close(src[:, 2, 5], torch.tensor([1.0, 0.0, 0.2]))
    assert src.sum().item() == pytest.approx(1.2)


def test_gray_color_and_transparent_files_are_converted(folder: Path) -> None:
    write(folder / "src" / "a.png", 51, mode="L")
    write(folder / "mask" / "a.png", 255, mode="RGB")
    Image.new("RGBA", (SIZE[1], SIZE[0]), (51, 51, 51, 128)).save(folder / "ref" / "a.webp")
    (folder / "ref" / "a.jpg").unlink()
    item = RemovalDataset(folder)[0]
    assert item["src"].shape == item["ref"].shape == (3, *SIZE)
    torch.testing.assert_close(item["mask"], torch.ones(1, *SIZE))


def test_the_masked_source_stands_in_for_an_absent_ref_folder(folder: Path) -> None:
    for path in (folder / "ref").iterdir():
        path.unlink()
    (folder / "ref").rmdir()
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[4:9, 20:30] = 255
    Image.fromarray(mask).save(folder / "mask" / "a.png")
    item = RemovalDataset(folder)[0]
    inside = item["mask"][0] > 0
    assert (item["ref"][:, inside] == 0.5).all()
    assert torch.equal(item["ref"][:, ~inside], item["src"][:, ~inside])


@pytest.mark.parametrize("part", ["src", "mask", "result", "ref"])
def test_a_missing_file_is_named_with_its_sample(folder: Path, part: str) -> None:
    next((folder / part).glob("b.*")).unlink()
    with pytest.raises(FileNotFoundError, match=rf"Sample 'b' has no `{part}`: .*{part}/b"):
        RemovalDataset(folder)


@pytest.mark.parametrize("part", ["src", "mask", "result"])
def test_a_missing_folder_is_named(folder: Path, part: str) -> None:
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"Expected a folder .*{part}, but there is none"):
        RemovalDataset(folder)


def test_an_empty_layout_is_an_error(tmp_path: Path) -> None:
    for part in ("src", "mask", "result"):
        (tmp_path / part).mkdir()
    with pytest.raises(FileNotFoundError, match="but got none"):
        RemovalDataset(tmp_path)


@pytest.mark.parametrize("part", ["src", "mask", "result", "ref"])
@pytest.mark.parametrize("content", [b"", b"no image"])
def test_an_unreadable_file_is_named(folder: Path, part: str, content: bytes) -> None:
    path = next((folder / part).glob("b.*"))
    path.write_bytes(content)
    data = RemovalDataset(folder)
    assert set(data[0]) == {"src", "mask", "result", "ref"}
    with pytest.raises(ValueError, match=rf"`{part}` of sample 'b': .*{path.name} cannot be read"):
        data[1]


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "src" / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"`src` of sample 'a': .*a\.png cannot be read"):
        RemovalDataset(folder)[0]


def test_a_mask_of_another_size_is_named(folder: Path) -> None:
    write(folder / "mask" / "a.png", 255, size=(48, 64), mode="L")
    with pytest.raises(ValueError, match=r"`mask` of sample 'a': .*48x32, but got 64x48.*mask/a"):
        RemovalDataset(folder)[0]


@pytest.mark.parametrize("part", ["result", "ref"])
def test_a_file_of_another_size_is_named(folder: Path, part: str) -> None:
    path = next((folder / part).glob("a.*"))
    write(path, size=(48, 32))
    with pytest.raises(
        ValueError, match=rf"`{part}` of sample 'a' to be 32x48 .*{path.name} is 48"
    ):
        RemovalDataset(folder)[0]


def test_sides_must_be_multiples_of_16(folder: Path) -> None:
    for part in ("src", "mask", "result", "ref"):
        write(next((folder / part).glob("a.*")), 255, size=(32, 40), mode="L")
    with pytest.raises(
        ValueError, match=r"sample 'a' to be multiples of 16, but .*a\.png is 32x40"
    ):
        RemovalDataset(folder)[0]


def test_size_must_match_when_given(folder: Path) -> None:
    assert RemovalDataset(folder, size=SIZE)[0]["src"].shape == (3, *SIZE)
    with pytest.raises(ValueError, match=r"`src` of sample 'a' to be 32x32 .*a\.png is 32x48"):
        RemovalDataset(folder, size=32)[0]
    with pytest.raises(ValueError, match="Expected `size` to be made of multiples of 16"):
        RemovalDataset(folder, size=(32, 40))


def test_two_files_of_one_stem_are_an_error(folder: Path) -> None:
    write(folder / "src" / "a.jpg")
    with pytest.raises(ValueError, match=r"Sample 'a' has two files for `src`: .*a\.jpg and .*a\."):
        RemovalDataset(folder)


def test_other_files_are_left_alone(folder: Path) -> None:
    (folder / "src" / "notes.txt").write_text("not an image")
    write(folder / "src" / ".hidden.png")
    assert RemovalDataset(folder).stems == ["a", "b"]


def test_made_data_is_read_back_and_made_once(tmp_path: Path) -> None:
    make_data(tmp_path, train_count=3, test_count=1, size=64)
    data = RemovalDataset(tmp_path / "train", size=64)
    assert data.stems == ["0000", "0001", "0002"]
    lines = (tmp_path / "train" / "metadata.jsonl").read_text().splitlines()
    said = [json.loads(line) for line in lines]
    assert [entry["mask"] for entry in said] == ["blob", "stroke", "box"]
    for item, entry in zip(data, said, strict=True):
        assert set(item["mask"].unique().tolist()) == {0.0, 1.0}
        assert item["mask"].mean().item() == pytest.approx(entry["area"], abs=1e-3)
        assert (item["src"] - item["result"]).abs().max() > 0.1
    path = tmp_path / "train" / "src" / "0001.png"
    first, written = path.read_bytes(), path.stat().st_mtime_ns
    make_data(tmp_path, train_count=3, test_count=1, size=64)
    assert path.stat().st_mtime_ns == written
    make_data(tmp_path, train_count=2, test_count=1, size=64)
    assert path.read_bytes() == first
    assert len(RemovalDataset(tmp_path / "train")) == 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photographs_lie_under_their_masks(folder: Path, orientation: int) -> None:
    shown = np.zeros((*SIZE, 3), dtype=np.uint8)
    shown[4:12, 20:44] = 255
    write_turned(folder / "src" / "a.png", shown, orientation)
    Image.fromarray(shown[..., 0]).save(folder / "mask" / "a.png")
    data = RemovalDataset(folder)
    item = data[0]
    assert torch.equal(item["src"][:1], item["mask"])
    assert image_sizes(data)[0] == SIZE[::-1]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 4 * 4),
        ({"invert_mask": True}, 32 * 48 - 4 * 4),
        ({"grow_mask": 1}, 4 * 4 + 4 * 4),
        ({"mask_label": 0}, 32 * 48 - 4 * 4),
    ],
)
def test_masks_are_read_as_the_options_say(
    folder: Path, changed: dict[str, Any], expected: int
) -> None:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[8:12, 8:12] = 1
    (folder / "mask" / "a.png").unlink()
    np.save(folder / "mask" / "a.npy", mask)
    item = RemovalDataset(folder, reading=DataOptions(**changed))[0]
    assert item["mask"].sum() == expected
    assert set(item["mask"].unique().tolist()) == {0.0, 1.0}


def test_the_background_is_seen_through_transparent_pixels(folder: Path) -> None:
    Image.new("RGBA", SIZE[::-1], (255, 0, 0, 0)).save(folder / "src" / "a.png")
    assert (RemovalDataset(folder)[0]["src"] == 1).all()
    found = RemovalDataset(folder, reading=DataOptions(background="black"))[0]["src"]
    assert (found == 0).all()


@pytest.mark.parametrize("name", ["holiday.png", "train/src/holiday.png", "complete.json"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    with pytest.raises(FileExistsError, match="holds other files"):
        make_data(tmp_path, train_count=1, test_count=1, size=32)
    assert path.read_text() == "{}"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_foreign_files_in_a_written_folder_stay(tmp_path: Path) -> None:
    make_data(tmp_path, train_count=2, test_count=1, size=32)
    foreign = [tmp_path / "train" / "src" / name for name in ("0007.png", "mine.png")]
    for path in foreign:
        path.write_text("mine")
    make_data(tmp_path, train_count=1, test_count=1, size=32)
    assert not (tmp_path / "train" / "src" / "0001.png").exists()
    assert all(path.read_text() == "mine" for path in foreign)


def test_interrupted_data_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_split = make_data_module.write_split

    def stop(folder: Path, split: str, *args: Any, **kwargs: Any) -> None:
        if split == "test":
            raise KeyboardInterrupt
        write_split(folder, split, *args, **kwargs)

    monkeypatch.setattr(make_data_module, "write_split", stop)
    with pytest.raises(KeyboardInterrupt):
        make_data(tmp_path, train_count=2, test_count=1, size=32)
    monkeypatch.undo()
    make_data(tmp_path, train_count=1, test_count=1, size=32)
    assert len(RemovalDataset(tmp_path / "train")) == len(RemovalDataset(tmp_path / "test")) == 1


def test_a_run_reads_masks_as_its_options_say(
    arguments: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ReadingOptions] = []

    class Stopping(RemovalDataset):
        def __init__(self, *args: Any, reading: ReadingOptions, **kwargs: Any) -> None:
            seen.append(reading)
            raise KeyboardInterrupt

    monkeypatch.setattr(before_training, "RemovalDataset", Stopping)
    flags = {"mask_label": 255, "invert_mask": True, "grow_mask": 2, "resize_mask": True}
    with pytest.raises(KeyboardInterrupt):
        train.train(parse_options(arguments(**flags, background="black")))
    assert {name: getattr(seen[0], name) for name in flags} == flags
    assert (seen[0].background, seen[0].threshold_mask) == ("black", False)


@pytest.mark.parametrize(
    "flags",
    [
        ["--bucket_step", "40", "--resolution", "512"],
        ["--resolution", "32"],
        ["--crop_context", "-0.1", "--resolution", "512"],
        ["--background", "no color"],
        ["--grow_mask", "-1"],
        ["--mask_label", "-2"],
        ["--mask_label", "1", "--threshold_mask"],
    ],
)
def test_reading_options_that_cannot_be_honored_raise(flags: list[str]) -> None:
    with pytest.raises(ValueError, match=f"Expected .*`{flags[0][2:]}`"):
        parse_options(["--train_data_dir", "data", *flags])


@pytest.mark.parametrize("flags", [["--bucket_step", "32"], ["--crop_context", "1"]])
def test_buckets_need_a_resolution(flags: list[str]) -> None:
    with pytest.raises(ValueError, match=f"`resolution` together with `{flags[0][2:]}`"):
        parse_options(["--train_data_dir", "data", *flags])


def test_kinds_of_a_manifest_are_in_the_items(tmp_path: Path, triplets: Path) -> None:
    kinds = ["glow", None, "shadow", "glow"]
    lines = []
    for index, kind in enumerate(kinds):
        row: dict[str, object] = {
            part: str(triplets / part / f"{index:03d}.png") for part in ("src", "mask", "result")
        }
        lines.append(json.dumps(row | ({"kind": kind} if kind else {})))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    dataset = RemovalDataset(tmp_path)
    assert dataset.kinds == ["glow", "shadow"]
    assert [int(dataset[index]["kind"]) for index in range(4)] == [0, -1, 1, 0]
    (tmp_path / "manifest.jsonl").write_text(lines[0].replace('"glow"', "3"))
    with pytest.raises(ValueError, match="`kind` of another type"):
        RemovalDataset(tmp_path)
