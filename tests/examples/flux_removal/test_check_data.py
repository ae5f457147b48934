"""The checks of a data set: every fault is made in a sound one and found by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage import data as photographs
from two_processes import run_in_two_processes

import check_data
import train
from make_data import make_data
from options.parsing import parse_options
from removal_data.checks.alignment import estimate_shift
from removal_data.checks.report import Report, add_contents, start_report
from removal_data.options import DataOptions

pytestmark = pytest.mark.slow

SIZE = (192, 256)


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(change(np.array(Image.open(path))).astype(np.uint8)).save(path)


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """Write three triplets of one photograph: a dark disk, of which the target has nothing."""
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]]
    for index in range(3):
        left = 90 * index
        target = photographs.chelsea()[40 : 40 + SIZE[0], left : left + SIZE[1]]
        disk = np.hypot(ys - 100, xs - 110) < 30
        parts = {"src": np.where(disk[..., None], 20, target), "result": target}
        parts["mask"] = 255 * ndimage.binary_dilation(disk, iterations=3)
        for name, values in parts.items():
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(values.astype(np.uint8))
            image.save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


def report_of(folder: Path, **reading: Any) -> Report:
    options = DataOptions(**reading)
    report = start_report(folder, options)
    add_contents(report, options)
    return report


def run(folder: Path, *flags: str) -> int:
    return check_data.main([str(folder), "--output_dir", str(folder.parent / "out"), *flags])


def test_sound_data_has_no_findings(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(sound) == 0
    told = capsys.readouterr().out
    assert "3 samples in" in told
    assert "3 without findings, 0 with warnings, 0 with errors" in told
    assert "size       256x192: 3" in told
    area = float((np.array(Image.open(sound / "mask" / "0.png")) > 0).mean())
    assert f"median {area:.1%}" in told
    assert Image.open(sound.parent / "out" / "contact_sheet.png").height > 3 * 144


def test_made_data_has_no_findings(tmp_path: Path) -> None:
    make_data(tmp_path, train_count=12, test_count=6)
    for split in ("train", "test"):
        assert report_of(tmp_path / split).findings == []


def remove_result(folder: Path) -> None:
    (folder / "result" / "1.png").unlink()


def damage(part: str, *, keep: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / part / "1.png"
        path.write_bytes(path.read_bytes()[:keep])

    return change


def resize(part: str, size: tuple[int, int]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / part / "1.png"
        Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)

    return change


def duplicate(folder: Path) -> None:
    Image.open(folder / "src" / "1.png").save(folder / "src" / "1.jpg")


ERRORS = {
    "a missing file": (remove_result, "result", "missing", "has no `result`"),
    "two files": (duplicate, "src", "ambiguous", "two files"),
    "a broken header": (damage("src", keep=10), "src", "unreadable", "cannot be read"),
    "a broken header of a mask": (damage("mask", keep=0), "mask", "unreadable", "cannot be read"),
    "truncated pixels": (damage("result", keep=9000), "result", "unreadable", "cannot be read"),
    "another size": (resize("result", (192, 192)), "result", "size", "256x192"),
    "a mask of another size": (resize("mask", (64, 48)), "mask", "size", "--resize_mask"),
    "swapped sides": (resize("mask", (192, 256)), "mask", "size", "192x256"),
}


@pytest.mark.parametrize(("fault", "part", "kind", "told"), ERRORS.values(), ids=ERRORS)
def test_errors(
    sound: Path,
    fault: Callable[[Path], None],
    part: str,
    kind: str,
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(sound)
    (finding,) = report_of(sound).findings
    assert (finding.sample, finding.part, finding.kind, finding.error) == ("1", part, kind, True)
    assert told in finding.text
    assert run(sound) == 2
    assert "error" in capsys.readouterr().out
    assert run(sound, "--skip_broken") == 1


def test_sides_of_other_multiples_are_an_error(sound: Path) -> None:
    for part in ("src", "mask", "result"):
        resize(part, (250, 192))(sound)
    (finding,) = report_of(sound).findings
    assert "multiples of 16" in finding.text
    assert "250x192" in finding.text


def of_part(part: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / part / "1.png", change)


def copy_source(folder: Path) -> None:
    Image.open(folder / "src" / "1.png").save(folder / "result" / "1.png")


def copy_source_as_jpeg(folder: Path) -> None:
    (folder / "result" / "1.png").unlink()
    Image.open(folder / "src" / "1.png").save(folder / "result" / "1.jpg", quality=95)


def shift(rows: int, columns: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: np.roll(image, (rows, columns), (0, 1))


WARNINGS = {
    "an empty mask": (of_part("mask", lambda m: 0 * m), "mask", "empty"),
    "a full mask": (of_part("mask", lambda m: 0 * m + 255), "mask", "whole image"),
    "an inverted mask": (of_part("mask", lambda m: 255 - m), "mask", "probably inverted"),
    "target equal to source": (copy_source, "result", "equals the source"),
    "target equal as JPEG": (copy_source_as_jpeg, "result", "equals the source"),
    "a shift to the right": (of_part("result", shift(0, 7)), "result", "7 pixels to the right"),
    "a shift up": (of_part("result", shift(-4, 0)), "result", "-4 down"),
    "another scene": (
        of_part("result", lambda r: photographs.astronaut()[:192, :256]),
        "result",
        "another scene",
    ),
    "another exposure": (of_part("result", lambda r: 0.7 * r), "result", "colors, exposure"),
}


@pytest.mark.parametrize(("fault", "part", "told"), WARNINGS.values(), ids=WARNINGS)
def test_warnings(sound: Path, fault: Callable[[Path], None], part: str, told: str) -> None:
    fault(sound)
    (finding,) = report_of(sound).findings
    assert (finding.sample, finding.part, finding.error) == ("1", part, False)
    assert told in finding.text
    assert run(sound) == 1
    assert run(sound, "--headers_only") == 0


def test_a_reference_with_the_object_is_a_warning(sound: Path) -> None:
    (sound / "ref").mkdir()
    for index in range(3):
        part = "src" if index == 1 else "result"
        Image.open(sound / part / f"{index}.png").save(sound / "ref" / f"{index}.png")
    (finding,) = report_of(sound).findings
    assert (finding.sample, finding.part) == ("1", "ref")
    assert "shows the object" in finding.text


def test_shadows_are_no_finding(sound: Path) -> None:
    def darken(image: np.ndarray) -> np.ndarray:
        image[120:150, 60:200] //= 2
        return image

    edit(sound / "src" / "1.png", darken)
    assert report_of(sound).findings == []


def test_the_shift_of_a_large_image_is_in_its_own_pixels(sound: Path) -> None:
    for part in ("src", "mask", "result"):
        resize(part, (1024, 768))(sound)
    edit(sound / "result" / "1.png", shift(0, 24))
    (finding,) = report_of(sound).findings
    assert "24 pixels to the right" in finding.text


@pytest.mark.parametrize("shifted", [(0, 0), (9, 0), (0, -14), (-6, 11)])
def test_shifts_are_estimated(shifted: tuple[int, int]) -> None:
    image = photographs.camera()[100:300, 100:340].astype(np.float32)
    assert estimate_shift(image, np.roll(image, shifted, (0, 1))) == shifted


def test_reading_options_decide_what_is_found(sound: Path) -> None:
    for index in range(3):
        edit(sound / "mask" / f"{index}.png", lambda mask: 255 - mask)
    assert len(report_of(sound).findings) == 3
    assert report_of(sound, invert_mask=True).findings == []


def test_a_folder_that_is_none_ends_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "absent") == 2
    assert "Expected a folder" in capsys.readouterr().err


def test_nothing_that_can_be_used_is_an_error_even_when_skipping(sound: Path) -> None:
    for index in range(3):
        (sound / "mask" / f"{index}.png").write_bytes(b"")
    assert run(sound, "--skip_broken") == 2


def test_it_runs_as_a_program(sound: Path) -> None:
    copy_source(sound)
    flags = [str(sound), "--output_dir", str(sound / "out"), "--rows", "0"]
    ended = subprocess.run(
        [sys.executable, check_data.__file__, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert not (sound / "out").exists()


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    class LoadedError(Exception):
        pass

    def load(*arguments: Any, **further: Any) -> None:
        raise LoadedError("The model was loaded.")

    monkeypatch.setattr(train, "load_pipeline", load)


@pytest.mark.usefixtures("without_models")
@pytest.mark.parametrize("fault", [remove_result, damage("result", keep=9000)])
def test_a_run_ends_before_the_model_is_loaded(
    arguments: Callable[..., list[str]], sound: Path, fault: Callable[[Path], None]
) -> None:
    fault(sound)
    with pytest.raises(ValueError, match=r"got 1 in 1 samples:\n.*\b1\b"):
        train.train(parse_options(arguments(train_data_dir=sound)))


@pytest.mark.usefixtures("without_models")
def test_headers_alone_can_be_checked_before_a_run(
    arguments: Callable[..., list[str]], sound: Path
) -> None:
    damage("result", keep=9000)(sound)
    with pytest.raises(Exception, match="model was loaded"):
        train.train(parse_options(arguments(train_data_dir=sound, check_data="headers")))


def test_a_run_goes_on_without_broken_samples_and_prints_all_findings(
    arguments: Callable[..., list[str]], sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage("result", keep=9000)(sound)
    edit(sound / "mask" / "0.png", lambda mask: 0 * mask)
    flags = arguments(train_data_dir=sound, skip_broken=True, max_train_steps=1)
    assert train.train(parse_options(flags)).is_dir()
    told = capsys.readouterr().out
    assert "Left out 1 samples" in told
    assert "The mask is empty" in told


def test_buckets_are_listed_and_masks_that_they_cut_are_found(
    sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--resolution", "128", "--bucket_step", "64")
    assert run(sound, *flags) == 0
    assert "bucket     128x128: 3" in capsys.readouterr().out
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[95:105, 8:248] = 255
    Image.fromarray(mask).save(sound / "mask" / "1.png")
    assert run(sound, *flags) == 1
    # 240 columns of mask, of which the square of the image's height holds 192.
    assert "The crop to 128x128 cuts off 20.0% of the mask" in capsys.readouterr().out


def test_what_one_process_finds_all_leave_out(
    arguments: Callable[..., list[str]], sound: Path
) -> None:
    damage("result", keep=9000)(sound)  # sample 1, which process 1 of 2 reads
    flags = arguments(train_data_dir=sound, skip_broken=True, batch_size=1, max_train_steps=3)
    printed = run_in_two_processes(train.__file__, *flags)
    assert printed.count("Left out 1 samples") == 1
