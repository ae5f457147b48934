"""What a file held goes out again: profile, EXIF data, transparency, format, unchanged pixels."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from image_io import writing
from image_io.metadata import read_exif
from image_io.reading import LoadedImage, read_image
from image_io.writing import check_output, default_suffix, write_image

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)
INSIDE = np.zeros((32, 48), dtype=bool)
INSIDE[8:20, 10:30] = True


def swapped_profile() -> bytes:
    """Return sRGB's profile with the primaries of red and blue exchanged."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"qXYZ").replace(b"bXYZ", b"rXYZ").replace(b"qXYZ", b"bXYZ")


def gray_profile() -> bytes:
    """Return a profile of gray with gamma 1, made of the tags that its standard asks for."""
    d50 = bytes.fromhex("0000f6d6000100000000d32d")
    tags = {
        b"desc": b"desc\0\0\0\0\0\0\0\5gray\0" + b"\0" * 78,
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": b"XYZ \0\0\0\0" + d50,
        b"kTRC": b"curv\0\0\0\0\0\0\0\0",
    }
    table, body, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        padded = data + b"\0" * (-len(data) % 4)
        table += name + (offset + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += padded
    content = len(tags).to_bytes(4, "big") + table + body
    head = (128 + len(content)).to_bytes(4, "big") + b"\0\0\0\0\2\x20\0\0mntrGRAYXYZ "
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + d50
    return head + b"\0" * (128 - len(head)) + content


def painted(loaded: LoadedImage, color: tuple[int, int, int] = (10, 200, 90)) -> Image.Image:
    found = np.array(loaded.rgb)
    found[INSIDE] = color
    return Image.fromarray(found)


def write(tmp_path: Path, loaded: LoadedImage, name: str, exif: bytes | None = None) -> Image.Image:
    write_image(painted(loaded), tmp_path / "out" / name, loaded, exif)
    with Image.open(tmp_path / "out" / name) as written:
        written.load()
        assert os.listdir(tmp_path / "out") == [name]
        return written


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "bmp"])
def test_formats_without_loss_hold_every_pixel(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    loaded = read_image(tmp_path / "a.png")
    written = write(tmp_path, loaded, f"b.{suffix}")
    assert np.array_equal(np.array(written), np.array(painted(loaded)))
    assert "icc_profile" not in written.info


def test_formats_with_loss_are_written_well(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    loaded, suffixes = read_image(tmp_path / "a.png"), ["jpg", "jpeg", "avif"]
    if writing.HAS_HEIF:
        suffixes.append("heic")
    for suffix in suffixes:
        folder = tmp_path / suffix
        found = np.array(write(folder, loaded, f"b.{suffix}").convert("RGB"), np.float64)
        error = np.square(found - np.array(painted(loaded))).mean()
        assert 10 * math.log10(255**2 / error) > 30, suffix
    written = Image.open(tmp_path / "jpg" / "out" / "b.jpg")
    best = tmp_path / "q95.jpg"
    Image.fromarray(NOISE).save(best, quality=95)
    assert written.quantization == Image.open(best).quantization


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg", "avif"])
def test_the_profile_goes_out_again(tmp_path: Path, suffix: str) -> None:
    profile = swapped_profile()
    smooth = Image.fromarray(NOISE).resize((4, 3)).resize((48, 32), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png", icc_profile=profile)
    loaded = read_image(tmp_path / "a.png")
    written = write(tmp_path, loaded, f"b.{suffix}")
    assert written.info["icc_profile"] == profile
    again = np.array(read_image(tmp_path / "out" / f"b.{suffix}").rgb).astype(int)
    lossy = suffix in ("jpg", "avif")
    inner = np.s_[11:17, 14:26]
    assert np.abs(again - np.array(painted(loaded)))[inner].max() <= (12 if lossy else 3)
    if not lossy:
        assert np.array_equal(np.array(written)[~INSIDE], np.array(smooth)[~INSIDE])
        expected = ImageCms.profileToProfile(
            painted(loaded),
            ImageCms.createProfile("sRGB"),
            ImageCms.ImageCmsProfile(writing_file(profile, tmp_path)),
        )
        got = np.array(written)[INSIDE].astype(int)
        assert np.abs(got - np.array(expected)[INSIDE]).max() <= 2


def writing_file(data: bytes, folder: Path) -> str:
    path = folder / "profile.icc"
    path.write_bytes(data)
    return str(path)


def test_a_gray_profile_keeps_a_photograph_gray(tmp_path: Path) -> None:
    profile, values = gray_profile(), RNG.integers(0, 256, (32, 48), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png", icc_profile=profile)
    loaded = read_image(tmp_path / "a.png")
    linear = np.array(loaded.rgb)[values == 55][0]
    assert np.abs(linear.astype(int) - 128).max() <= 2  # 55 / 255 in linear light
    written = write(tmp_path, loaded, "b.png")
    assert (written.mode, written.info["icc_profile"]) == ("L", profile)
    assert np.array_equal(np.array(written)[~INSIDE], values[~INSIDE])
    srgb = write(tmp_path / "web", loaded, "b.webp")
    assert srgb.mode == "RGB"
    assert "sRGB" in ImageCms.getProfileName(io.BytesIO(srgb.info["icc_profile"]))
    assert np.array_equal(np.array(srgb), np.array(painted(loaded)))
    assert "icc_profile" not in write(tmp_path / "bmp", loaded, "b.bmp").info


def test_a_gray_profile_of_a_colored_image_is_ignored(tmp_path: Path) -> None:
    Image.fromarray(NOISE).save(tmp_path / "a.png", icc_profile=gray_profile())
    with pytest.warns(UserWarning, match=r"profile of a\.png is ignored"):
        loaded = read_image(tmp_path / "a.png")
    assert np.array_equal(np.array(loaded.rgb), NOISE)
    assert "icc_profile" not in write(tmp_path, loaded, "b.png").info


def test_a_profile_of_colors_fits_a_gray_image(tmp_path: Path) -> None:
    image = Image.fromarray(NOISE[..., 0])
    image.save(tmp_path / "a.png", icc_profile=swapped_profile())
    loaded = read_image(tmp_path / "a.png")
    assert loaded.icc_profile == swapped_profile()
    written = write(tmp_path, loaded, "b.png")
    assert np.array_equal(np.array(written)[~INSIDE], np.array(image.convert("RGB"))[~INSIDE])


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparency_goes_out_again(tmp_path: Path, suffix: str) -> None:
    alpha = RNG.integers(0, 256, (32, 48), dtype=np.uint8)
    alpha[INSIDE] = 128
    alpha[10:12, 12:14] = 0
    Image.fromarray(np.dstack([NOISE, alpha])).save(tmp_path / "a.png")
    loaded = read_image(tmp_path / "a.png", "black")
    written = np.array(write(tmp_path, loaded, f"b.{suffix}"))
    assert np.array_equal(written[..., 3], alpha)
    assert np.array_equal(written[~INSIDE], np.dstack([NOISE, alpha])[~INSIDE])
    shown = np.array(read_image(tmp_path / "out" / f"b.{suffix}", "black").rgb).astype(int)
    seen = INSIDE & (alpha > 0)
    wanted = np.minimum(np.array(painted(loaded)), alpha[..., None])[seen]
    assert np.abs(shown[seen] - wanted).max() <= 1


def test_transparency_is_filled_where_the_format_has_none(tmp_path: Path) -> None:
    alpha = np.full((32, 48), 255, np.uint8)
    alpha[:, 40:] = 60
    Image.fromarray(np.dstack([NOISE, alpha])).save(tmp_path / "a.png")
    loaded = read_image(tmp_path / "a.png", "red")
    written = write(tmp_path, loaded, "b.bmp")
    assert np.array_equal(np.array(written), np.array(painted(loaded)))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("out", ["jpg", "png", "webp", "tif", "avif"])
def test_exif_goes_out_again_for_an_upright_image(tmp_path: Path, suffix: str, out: str) -> None:
    exif = Image.Exif()
    exif[271], exif[274] = "a camera", 6
    exif[34665] = {0x9003: "2020:01:02 03:04:05", 0xA002: 32, 0xA003: 48}
    exif[34853] = {1: "N", 2: (1.0, 2.0, 3.0)}
    source = tmp_path / f"a.{suffix}"
    Image.fromarray(NOISE).transpose(Image.Transpose.ROTATE_90).save(source, exif=exif.tobytes())
    loaded = read_image(source)
    assert loaded.rgb.size == (48, 32)
    written = write(tmp_path, loaded, f"b.{out}", read_exif(source))
    assert written.size == (48, 32)
    with Image.open(tmp_path / "out" / f"b.{out}") as opened:
        found = opened.getexif()
        assert (found[271], found.get(274, 1)) == ("a camera", 1)
        block, place = found.get_ifd(34665), found.get_ifd(34853)
    assert block[0x9003] == "2020:01:02 03:04:05"
    assert (block[0xA002], block[0xA003]) == (48, 32)
    assert place[1] == "N"
    assert [float(v) for v in place[2]] == [1.0, 2.0, 3.0]
    assert read_image(tmp_path / "out" / f"b.{out}").rgb.size == (48, 32)


def test_no_exif_stays_none(tmp_path: Path) -> None:
    for suffix in ("png", "tif", "jpg"):
        Image.fromarray(NOISE).save(tmp_path / f"a.{suffix}")
        assert read_exif(tmp_path / f"a.{suffix}") is None


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("a.jpg", ".jpg"), ("a.png", ".png"), ("a.webp", ".webp"), ("a.tiff", ".tif")),
        *(("a.bmp", ".bmp"), ("a.avif", ".avif"), ("a.ppm", ".png")),
    ],
)
def test_the_format_of_the_source_is_known(tmp_path: Path, name: str, suffix: str) -> None:
    Image.fromarray(NOISE).save(tmp_path / name)
    assert default_suffix(read_image(tmp_path / name)) == suffix


@pytest.fixture
def source(tmp_path: Path) -> Path:
    alpha = np.where(INSIDE, 0, 255).astype(np.uint8)
    Image.fromarray(np.dstack([NOISE, alpha])).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def check(source: Path, output: Path, **settings: Any) -> None:
    check_output(output, read_image(source), **settings)


def test_a_file_is_not_overwritten_by_accident(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(source)
    (tmp_path / "hard.png").hardlink_to(source)
    for name in ("a.png", "link.png", "hard.png", "../" + tmp_path.name + "/a.png"):
        with pytest.raises(FileExistsError, match="--overwrite"):
            check(source, tmp_path / name)
        check(source, tmp_path / name, overwrite=True)
    check(source, tmp_path / "new.png")


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("b.xyz", ValueError, r"one of \.png"),
        ("b", ValueError, r"one of \.png"),
        ("b.jpg", ValueError, "--background"),
        ("folder.png", IsADirectoryError, "is a folder"),
        ("a.png/b.png", NotADirectoryError, "to be a folder"),
    ],
)
def test_outputs_that_could_not_be_written(
    source: Path, tmp_path: Path, name: str, error: type[Exception], text: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=text):
        check(source, tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_outputs_that_can_be_written(source: Path, tmp_path: Path) -> None:
    check(source, tmp_path / "b.jpg", flatten=True)
    check(source, tmp_path / "new" / "folders" / "b.webp")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(source: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="closed"):
        check(source, tmp_path / "closed" / "b.png")


def test_what_a_format_cannot_hold(tmp_path: Path) -> None:
    Image.new("RGB", (17_000, 1)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"at most 16383 pixels in .*b\.webp"):
        check(tmp_path / "a.png", tmp_path / "b.webp")
    with pytest.raises(ValueError, match="bytes of EXIF data"):
        check(tmp_path / "a.png", tmp_path / "b.jpg", exif=b"\0" * 70_000)
    check(tmp_path / "a.png", tmp_path / "b.png", exif=b"\0" * 70_000)


def test_heic_needs_its_package(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "HAS_HEIF", False)
    with pytest.raises(ValueError, match="pip install pillow-heif"):
        check(source, tmp_path / "b.heic")


def test_a_failure_leaves_the_old_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, loaded = source.read_bytes(), read_image(source)

    def fail(self: Image.Image, path: Path, *args: Any, **kwargs: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        write_image(painted(loaded), source, loaded)
    assert source.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
