from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import odd_photographs
from image_io.mask_reading import read_mask
from image_io.options import ReadingOptions
from image_io.reading import read_image
from odd_photographs import PHOTOGRAPHS
from removal_data.sources.layouts import find_samples

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("photographs") / "mine"
    odd_photographs.main(["--output_dir", str(folder)])
    return folder


def test_they_are_found_with_the_sizes_that_are_told(folder: Path) -> None:
    samples, findings = find_samples(folder)
    assert findings == []
    assert sorted(sample.name for sample in samples) == sorted(PHOTOGRAPHS)
    for sample in samples:
        size = PHOTOGRAPHS[sample.name][:2]
        source, target = (read_image(sample.files[part]) for part in ("src", "result"))
        assert source.rgb.size == target.rgb.size == size
        mask = read_mask(sample.files["mask"], size, ReadingOptions())
        assert 0.001 < mask.mean() < 0.2
        changed = np.abs(np.array(source.rgb, int) - np.array(target.rgb)).mean(2)
        assert changed[mask].mean() > 20
        assert changed[~mask].mean() < 4


def test_the_files_are_as_odd_as_they_are_said_to_be(folder: Path) -> None:
    modes = {}
    for name, (_, _, file, *_) in PHOTOGRAPHS.items():
        with Image.open(folder / "src" / file) as image:
            modes[name] = (image.format, image.mode)
    assert modes["coffee"] == ("PNG", "P")
    assert modes["chelsea"] == ("PNG", "RGBA")
    assert modes["camera"] == ("PNG", "I;16")
    assert modes["china"] == ("JPEG", "CMYK")
    assert modes["grass"] == ("TIFF", "F")
    assert {format for format, _ in modes.values()} == {
        "PNG",
        "JPEG",
        "TIFF",
        "WEBP",
        "AVIF",
        "BMP",
    }
    with Image.open(folder / "src/astronaut.jpg") as image:
        assert image.getexif()[274] == 6
        assert image.size == (597, 511)
    with Image.open(folder / "mask/coffee.png") as image:
        assert image.getextrema() == (0, 1)


def test_the_page_lists_them() -> None:
    page = Path(__file__).parents[3] / "docs/tutorials/remove_objects_from_own_photographs.md"
    text = page.read_text(encoding="utf-8")
    for name, (width, height, *_) in PHOTOGRAPHS.items():
        assert f"| `{name}` | {width} × {height} |" in text


def test_a_folder_with_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(FileExistsError, match="Expected a new folder"):
        odd_photographs.main(["--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
