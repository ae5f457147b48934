from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from object_removal.files import find_jobs, without_existing
from removal_data.sources.samples import raise_first


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def pairs(
    image: Path, mask: Path | None = None, output: Path = Path("out")
) -> tuple[dict[str, str | None], list[str]]:
    """Return masks by image, relative to the folder of both, and the texts of the findings."""
    jobs, findings = find_jobs(image, mask, None, output, [0])
    shown = {}
    for job in jobs:
        path = None if job.mask is None else str(job.mask.relative_to(image.parent))
        shown[str(job.image.relative_to(image.parent))] = path
    return shown, [finding.text for finding in findings]


def test_a_single_image_takes_what_it_is_given(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "m.png", "masks/a.png")
    (job,), findings = find_jobs(tmp_path / "a.jpg", tmp_path / "m.png", None, Path("o.png"), [3])
    assert (job.image, job.mask, job.ref) == (tmp_path / "a.jpg", tmp_path / "m.png", None)
    assert (job.outputs, findings) == ({3: Path("o.png")}, [])
    with pytest.raises(ValueError, match="--mask to be a file, as --image is"):
        find_jobs(tmp_path / "a.jpg", tmp_path / "masks", None, Path("o.png"), [0])
    with pytest.raises(ValueError, match="--ref to be a file"):
        find_jobs(tmp_path / "a.jpg", None, tmp_path / "masks", Path("o.png"), [0])


def test_masks_are_found_by_name_also_with_endings_in_folders_and_other_accents(
    tmp_path: Path,
) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    touch(tmp_path / "p", "a.jpg", "b_src.webp", "trip/c.tif", f"{decomposed}.png", "notes.txt")
    touch(tmp_path / "m", "a.png", "b_mask.npy", "trip/c_M.json", "café.png", ".hidden.png")
    found, texts = pairs(tmp_path / "p", tmp_path / "m")
    assert texts == []
    assert found == {
        "p/a.jpg": "m/a.png",
        "p/b_src.webp": "m/b_mask.npy",
        f"p/{decomposed}.png": "m/café.png",
        "p/trip/c.tif": "m/trip/c_M.json",
    }


def test_masks_lie_beside_their_images_or_in_folders_of_the_training_data(tmp_path: Path) -> None:
    touch(tmp_path / "p", "a.jpg", "a_mask.png", "b.png", "sub/c_F.png", "sub/c_M.png")
    found, texts = pairs(tmp_path / "p")
    assert texts == []
    assert found == {"p/a.jpg": "p/a_mask.png", "p/b.png": None, "p/sub/c_F.png": "p/sub/c_M.png"}
    touch(tmp_path / "t", "src/0.png", "mask/0.png", "result/0.png", "ref/0.png")
    assert pairs(tmp_path / "t") == ({"t/src/0.png": "t/mask/0.png"}, [])
    # Those of another folder are taken, if it is named.
    touch(tmp_path, "drawn/0.png")
    assert pairs(tmp_path / "t", tmp_path / "drawn") == ({"t/src/0.png": "drawn/0.png"}, [])


def test_one_mask_is_for_all_images(tmp_path: Path) -> None:
    touch(tmp_path / "p", "a.jpg", "b_M.png")
    touch(tmp_path, "m.png")
    found = {"p/a.jpg": "m.png", "p/b_M.png": "m.png"}
    assert pairs(tmp_path / "p", tmp_path / "m.png") == (found, [])


def test_what_does_not_fit_is_reported_and_the_others_are_edited(tmp_path: Path) -> None:
    touch(tmp_path / "p", "a.jpg", "b.jpg", "c.jpg", "c.png", "d.jpg")
    touch(tmp_path / "m", "a.png", "c.png", "d.png", "d_mask.png", "e.png")
    found, texts = pairs(tmp_path / "p", tmp_path / "m")
    assert found == {"p/a.jpg": "m/a.png"}
    assert len(texts) == 4
    for told in (
        "p/b.jpg has no mask",
        "m/e.png is a mask of no image",
        "'c' has two",
        "'d' has two",
    ):
        assert sum(told in text for text in texts) == 1
    _, findings = find_jobs(tmp_path / "p", tmp_path / "m", None, Path("out"), [0])
    with pytest.raises((ValueError, FileNotFoundError)):
        raise_first(findings)
    beside, texts = pairs(touch(tmp_path / "q", "a.jpg", "a_mask.png", "z_mask.png"))
    assert beside == {"q/a.jpg": "q/a_mask.png"}
    assert "z_mask.png is a mask of no image" in texts[0]


def test_references_are_found_as_masks_are(tmp_path: Path) -> None:
    touch(tmp_path / "p", "a.jpg", "b.jpg")
    touch(tmp_path, "m.png", "refs/a_ref.png", "refs/b.png")
    jobs, _ = find_jobs(tmp_path / "p", tmp_path / "m.png", tmp_path / "refs", Path("out"), [0])
    assert [job.ref for job in jobs] == [tmp_path / "refs/a_ref.png", tmp_path / "refs/b.png"]


def test_outputs_have_the_names_of_the_images_and_of_the_seeds(tmp_path: Path) -> None:
    touch(tmp_path / "p", "src/a.JPG", "src/trip/b.webp", "mask/a.png", "mask/trip/b.png")
    out = tmp_path / "out"
    jobs, _ = find_jobs(tmp_path / "p", None, None, out, [5])
    assert [job.outputs for job in jobs] == [{5: out / "a.JPG"}, {5: out / "trip/b.webp"}]
    jobs, _ = find_jobs(tmp_path / "p", None, None, out, [0, 12])
    assert jobs[0].outputs == {0: out / "a_seed0.JPG", 12: out / "a_seed12.JPG"}
    touch(out, "a_seed0.JPG", "trip/b_seed0.webp", "trip/b_seed12.webp")
    (left,) = without_existing(jobs)
    assert left.outputs == {12: out / "a_seed12.JPG"}
    assert left.image == jobs[0].image


def test_earlier_outputs_among_the_images_are_no_images(tmp_path: Path) -> None:
    touch(tmp_path / "p", "a.jpg", "a_mask.png", "removed/a.jpg", "removed/b.png", "removed/b.jpg")
    found, texts = pairs(tmp_path / "p", output=tmp_path / "p" / "removed")
    assert (found, texts) == ({"p/a.jpg": "p/a_mask.png"}, [])
    touch(tmp_path, "m.png")
    found, texts = pairs(tmp_path / "p", tmp_path / "m.png", tmp_path / "p" / "removed")
    assert (list(found), texts) == (["p/a.jpg", "p/a_mask.png"], [])


def test_folders_without_images_raise(tmp_path: Path) -> None:
    touch(tmp_path / "p", "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"Expected images in .*p, but got none"):
        find_jobs(tmp_path / "p", None, None, Path("out"), [0])
    touch(tmp_path / "p", "a.png")
    with pytest.raises(FileNotFoundError, match="--mask to be a file or a folder"):
        find_jobs(tmp_path / "p", tmp_path / "none", None, Path("out"), [0])
