"""`remove.py` on a folder: names, broken files, seeds, and what exists already."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import remove

pytestmark = pytest.mark.slow

Run = Callable[..., int]

SIZES = {"a.png": (90, 61), "b.jpg": (300, 200), "trip/c.webp": (64, 64)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with `photos` and `masks`; one photograph is larger than the model's size."""
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        mask = Image.new("L", (width, height))
        mask.paste(255, (20, 20, 40, 50))
        place = (tmp_path / "masks" / name).with_suffix(".png")
        place.parent.mkdir(parents=True, exist_ok=True)
        mask.save(place)
    return tmp_path


@pytest.fixture
def run(folder: Path, routed_checkpoint: Path, random_flux_fill: Path) -> Run:
    def call(*further: str, mask: str | None = "masks") -> int:
        flags = ["--image", str(folder / "photos"), "--output", str(folder / "out")]
        flags += ["--checkpoint", str(routed_checkpoint), "--flux_fill_id", str(random_flux_fill)]
        flags += ["--mask", str(folder / mask)] if mask else []
        return remove.main([*flags, "--steps", "1", *further])

    return call


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def test_all_images_are_written_under_their_names_with_one_model(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, load = [], remove.load_pipeline

    def count(*args: object, **kwargs: object) -> object:
        loaded.append(args)
        return load(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(remove, "load_pipeline", count)
    assert run("--outside", "paste", "--feather", "0") == 0
    assert len(loaded) == 1
    assert files_in(folder / "out") == set(SIZES)
    told = capsys.readouterr()
    assert "Wrote 3 images." in told.out
    assert "removing: 100%" in told.err
    for name in SIZES:
        before, after = pixels(folder / "photos" / name), pixels(folder / "out" / name)
        inside = pixels((folder / "masks" / name).with_suffix(".png")) > 0
        assert (before != after)[inside].any()
        if not name.endswith(".jpg"):
            assert np.array_equal(before[~inside], after[~inside])


def test_a_result_is_that_of_the_single_image(
    run: Run, folder: Path, routed_checkpoint: Path, random_flux_fill: Path
) -> None:
    assert run() == 0
    one = folder / "one.webp"
    flags = [
        "--image",
        str(folder / "photos/trip/c.webp"),
        "--mask",
        str(folder / "masks/trip/c.png"),
    ]
    flags += ["--checkpoint", str(routed_checkpoint), "--flux_fill_id", str(random_flux_fill)]
    assert remove.main([*flags, "--steps", "1", "--output", str(one)]) == 0
    assert np.array_equal(pixels(one), pixels(folder / "out/trip/c.webp"))


def test_several_seeds_have_several_outputs(run: Run, folder: Path) -> None:
    assert run("--seeds", "0", "7") == 0
    names = {f"{Path(n).with_suffix('')}_seed{s}{Path(n).suffix}" for n in SIZES for s in (0, 7)}
    assert files_in(folder / "out") == names
    first, second = (pixels(folder / f"out/a_seed{seed}.png") for seed in (0, 7))
    assert not np.array_equal(first, second)
    assert run("--seed", "7", "--overwrite") == 0
    assert np.array_equal(pixels(folder / "out/a.png"), second)


def test_broken_files_are_skipped_and_reported(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos/a.png").write_bytes((folder / "photos/a.png").read_bytes()[:500])
    Image.new("L", (300, 200)).save(folder / "masks/b.png")
    (folder / "photos/d.png").write_text("no image")
    assert run() == 1
    assert files_in(folder / "out") == {"trip/c.webp"}
    told = capsys.readouterr().err
    for part in ("a.png", "b.png, but it is empty", "d.png has no mask"):
        assert part in told
    assert told.count("Skipped: ") == 3
    assert run() == 2  # the last one exists now
    assert run("--overwrite") == 1


def test_the_first_error_ends_a_run_that_asks_for_it(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(remove, "load_pipeline", stop)
    (folder / "photos/a.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a\.png"):
        run("--fail_fast")
    (folder / "masks/b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg has no mask"):
        run("--fail_fast")
    assert not (folder / "out").exists()


def test_what_exists_is_left_alone_or_left_out_or_replaced(run: Run, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/a.png").write_bytes(b"earlier")
    assert run() == 1
    assert (folder / "out/a.png").read_bytes() == b"earlier"
    (folder / "out/b.jpg").unlink()
    assert run("--skip_existing") == 0
    assert (folder / "out/a.png").read_bytes() == b"earlier"
    assert (folder / "out/b.jpg").exists()
    assert run("--skip_existing") == 0
    assert run("--overwrite") == 0
    assert (folder / "out/a.png").read_bytes() != b"earlier"


def test_flags_that_exclude_each_other_end_the_program(run: Run) -> None:
    with pytest.raises(SystemExit):
        run("--overwrite", "--skip_existing")


def test_transparency_is_the_mask_of_an_image_without_one(
    run: Run, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Image.open(folder / "photos/a.png").convert("RGBA")
    image.putalpha(Image.open(folder / "masks/a.png").point(lambda value: 255 - value))
    image.save(folder / "photos/a.png")
    assert run(mask=None) == 1
    assert files_in(folder / "out") == {"a.png"}
    assert Image.open(folder / "out/a.png").mode == "RGB"
    assert capsys.readouterr().err.count("without transparent pixels") == 2


def test_errors_of_the_model_are_not_those_of_a_file(run: Run) -> None:
    with pytest.raises(ValueError, match="Expected no `guidance_scale`"):
        run("--guidance_scale", "3")
