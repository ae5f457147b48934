"""Photographs come out of Qt resource files and package folders."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

import more_photographs


def resource_file(files: dict[str, bytes], compressed: dict[str, bytes]) -> bytes:
    """Return an `.rcc` file of version 2 with one folder `pictures`."""
    names, contents, offsets = b"", b"", []
    for name in ("pictures", *files, *compressed):
        offsets.append(len(names))
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
    count = len(files) + len(compressed)
    tree = struct.pack(">IHIIQ", 0, 2, 1, 1, 0)
    tree += struct.pack(">IHIIQ", offsets[0], 2, count, 2, 0)
    for index, data in enumerate((*files.values(), *compressed.values())):
        packed = index >= len(files)
        data = struct.pack(">I", len(data)) + zlib.compress(data) if packed else data
        tree += struct.pack(">IHHHIQ", offsets[index + 1], int(packed), 0, 0, len(contents), 0)
        contents += struct.pack(">I", len(data)) + data
    head = struct.pack(">4s4I", b"qres", 2, 20, 20 + len(tree), 20 + len(tree) + len(contents))
    return head + tree + contents + names


def encoded(width: int, height: int, color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(more_photographs, "ACTIVITIES", ("animals",))
    monkeypatch.setattr(more_photographs, "WALLPAPERS", ("Lake",))
    resources = tmp_path / "usr/share/gcompris-qt/rcc"
    wallpaper = tmp_path / "usr/share/wallpapers/Lake/contents/images"
    puzzles = tmp_path / "usr/share/palapeli/collection"
    for folder in (resources, wallpaper, puzzles):
        folder.mkdir(parents=True)
    pictures = {
        "cow.png": encoded(840, 1260, "red"),
        "icon.png": encoded(64, 64, "white"),
        "text.qml": b"not an image",
        "Gogh.png": encoded(300, 300, "yellow"),
    }
    (resources / "animals.rcc").write_bytes(resource_file(pictures, {"late.qml": b"0" * 500}))
    (wallpaper / "small.png").write_bytes(encoded(210, 210, "white"))
    (wallpaper / "large.png").write_bytes(encoded(800, 420, "blue"))
    (puzzles / "bee.jpg").write_bytes(encoded(250, 300, "lime"))
    return tmp_path


def test_resources_come_out_by_name(packages: Path) -> None:
    path = packages / "usr/share/gcompris-qt/rcc/animals.rcc"
    found = dict(more_photographs.read_resources(path))
    assert list(found) == [
        f"pictures/{name}" for name in ("cow.png", "icon.png", "text.qml", "Gogh.png")
    ]
    assert found["pictures/text.qml"] == b"not an image"


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.rcc").write_bytes(b"PK" + bytes(30))
    with pytest.raises(ValueError, match="Qt resource file"):
        next(more_photographs.read_resources(tmp_path / "other.rcc"))


def test_photographs_are_large_ones_and_no_paintings(packages: Path) -> None:
    photographs = more_photographs.read_photographs(packages)
    assert [photograph.shape for photograph in photographs] == [
        (630, 420, 3),
        (420, 800, 3),
        (300, 250, 3),
    ]
    colors = [tuple(map(int, photograph[0, 0])) for photograph in photographs]
    assert colors == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]


def test_missing_package_is_named(packages: Path) -> None:
    (packages / "usr/share/palapeli/collection/bee.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="palapeli-data"):
        more_photographs.read_photographs(packages)
