"""Images of any kind are read as upright 8-bit sRGB, or the error names the file and the reason."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin

from image_io import image_files
from image_io.image_files import read_size
from image_io.reading import read_image
from image_io.value_ranges import value_range

TURN = Image.Transpose
STORED_AS = {
    **{2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE},
    **{6: TURN.ROTATE_90, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_270},
}
SMOOTH = np.stack(
    [
        np.linspace(0, 255, 48)[None].repeat(32, 0),
        np.linspace(0, 255, 32)[:, None].repeat(48, 1),
        np.full((32, 48), 99),
    ],
    axis=2,
).astype(np.uint8)
GRAY = np.arange(32 * 48).reshape(32, 48) % 256


def rgb_of(path: Path, **settings: Any) -> np.ndarray:
    loaded = read_image(path, **settings)
    assert (loaded.rgb.mode, loaded.rgb.size) == ("RGB", read_size(path))
    return np.array(loaded.rgb)


def gray_of(path: Path) -> np.ndarray:
    found = rgb_of(path)
    assert (found == found[..., :1]).all()
    return found[..., 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(SMOOTH)
    stored = image if orientation == 1 else image.transpose(STORED_AS[orientation])
    path = tmp_path / f"a.{suffix}"
    settings = {} if suffix in ("tif", "png") else {"quality": 100}
    stored.save(path, exif=exif.tobytes(), **settings)
    assert np.abs(rgb_of(path).astype(int) - SMOOTH).max() <= 12


def test_an_orientation_in_xmp_counts(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    path = tmp_path / "a.webp"
    Image.fromarray(SMOOTH).transpose(TURN.ROTATE_90).save(path, xmp=xmp, lossless=True)
    assert np.array_equal(rgb_of(path), SMOOTH)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_formats_without_loss(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    settings = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(SMOOTH).save(path, **settings)
    assert np.array_equal(rgb_of(path), SMOOTH)


def test_heic(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    for orientation in (1, 6):
        exif, image = Image.Exif(), Image.fromarray(SMOOTH)
        exif[274] = orientation
        path = tmp_path / "a.heic"
        stored = image if orientation == 1 else image.transpose(STORED_AS[orientation])
        stored.save(path, quality=100, chroma=444, exif=exif.tobytes())
        assert np.abs(rgb_of(path).astype(int) - SMOOTH).max() <= 12


def test_heic_without_its_package_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "HAS_HEIF", False)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"a\.heic cannot be read: .*pip install pillow-heif"):
        read_image(tmp_path / "a.heic")


@pytest.mark.parametrize(("background", "behind"), [("white", 255), ("black", 0), ("#0a0a0a", 10)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_shows_the_background(
    tmp_path: Path, background: str, behind: int, mode: str
) -> None:
    image = Image.new("RGBA", (48, 32), (100, 100, 100, 255))
    image.paste((100, 100, 100, 0), (0, 0, 24, 32))
    image.paste((100, 100, 100, 51), (0, 0, 12, 32))
    path = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "PA":
        path = tmp_path / "a.png"
        image.quantize(4).save(path)
        assert Image.open(path).mode == "P"
    else:
        image.convert(mode).save(path)
    found = rgb_of(path, background=background).astype(int)
    assert np.abs(found[:, 24:] - 100).max() <= 1
    assert np.abs(found[:, 12:24] - behind).max() <= 1
    assert np.abs(found[:, :12] - (0.2 * 100 + 0.8 * behind)).max() <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "I;16", "1"])
def test_a_transparent_color_is_transparency(tmp_path: Path, mode: str) -> None:
    values = np.full((32, 48), 200, np.uint8)
    values[:, :10] = 0
    image = Image.fromarray(values).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    clear = (0, 0, 0) if mode == "RGB" else image.getpixel((0, 0))
    image.save(tmp_path / "a.png", transparency=clear)
    found = gray_of(tmp_path / "a.png")
    assert (found[:, :10] == 255).all()
    assert (found[:, 10:] == (255 if mode == "1" else 200)).all()


def test_palettes_gray_and_one_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gray = Image.fromarray(GRAY.astype(np.uint8))
    gray.save(path)
    assert np.array_equal(gray_of(path), GRAY)
    gray.convert("1").save(path)
    assert np.array_equal(gray_of(path), np.array(gray.convert("1")) * 255)
    palette = Image.fromarray((GRAY % 3).astype(np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.save(path)
    assert np.array_equal(rgb_of(path), np.eye(3, dtype=np.uint8)[GRAY % 3] * 255)


def test_16_bit_gray(tmp_path: Path) -> None:
    deep = (GRAY * 257).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        assert np.array_equal(gray_of(tmp_path / name), GRAY)
    (tmp_path / "a.pgm").write_bytes(b"P5 48 32 65535\n" + deep.astype(">u2").tobytes())
    assert np.array_equal(gray_of(tmp_path / "a.pgm"), GRAY)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        ("uint8", 1),
        ("uint16", 257),
        (">u2", 257),
        ("int16", 32767 / 255),
        ("uint32", 1),
        ("uint32", 257),
        ("uint32", (2**32 - 1) / 255),
        ("int32", (2**31 - 1) / 255),
        ("int32", 1e6 / 255),
        ("float32", 1 / 255),
        ("float32", 1),
        ("float32", 257),
        ("float32", 20 / 255),
        ("float64", 1 / 255),
        ("float16", 1 / 255),
    ],
)
@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("planar", [False, True])
def test_tiff_by_its_range(
    tmp_path: Path, dtype: str, scale: float, color: bool, planar: bool
) -> None:
    shown = SMOOTH if color else GRAY
    values = (shown * np.float64(scale)).astype(dtype)
    order = {"byteorder": ">"} if dtype[0] == ">" else {}
    if planar and not color:
        pytest.skip("one plane")
    if planar:
        values, order = np.moveaxis(values, 2, 0), order | {"planarconfig": "separate"}
    kind = "rgb" if color else "minisblack"
    tifffile.imwrite(tmp_path / "a.tif", values, photometric=kind, **order)
    assert np.abs(rgb_of(tmp_path / "a.tif").astype(int) - shown.reshape(32, 48, -1)).max() <= 1


def test_negative_values_are_the_darkest(tmp_path: Path) -> None:
    for values in (GRAY.astype(np.int16) - 100, GRAY.astype(np.float32) / 255 * 2 - 1):
        tifffile.imwrite(tmp_path / "a.tif", values)
        assert np.abs(gray_of(tmp_path / "a.tif").astype(int) - GRAY).max() <= 1


def test_tags_name_the_range(tmp_path: Path) -> None:
    values = (GRAY * 16).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(281, "H", 1, 16 * 255, True)])
    assert np.array_equal(gray_of(tmp_path / "a.tif"), GRAY)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_can_be_zero(tmp_path: Path, dtype: str) -> None:
    values = ((255 - GRAY) * (257 if dtype == "uint16" else 1)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    assert np.array_equal(gray_of(tmp_path / "a.tif"), GRAY)


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.full((32, 48), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"a\.tif cannot be read: .*not a number"):
        read_image(tmp_path / "a.tif")


def test_a_range_of_an_overshooting_float_is_cut() -> None:
    assert value_range(np.array([-0.05, 1.05]), 32) == (0, 1)
    assert value_range(np.array([-1.0, 1.0]), 32) == (-1, 1)
    assert value_range(np.array([0.0, 0.0]), 32) == (0, 1)


def wide_profile() -> bytes:
    """Return a profile whose channels are those of sRGB, in another order, by its tags' names."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return data.replace(b"rXYZ", b"qXYZ").replace(b"bXYZ", b"rXYZ").replace(b"qXYZ", b"bXYZ")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_profiles_are_converted_to_srgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    settings = {"lossless": True} if suffix == "webp" else {}
    settings |= {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    Image.fromarray(SMOOTH).save(path, icc_profile=wide_profile(), **settings)
    found = rgb_of(path).astype(int)
    assert np.abs(found - SMOOTH[..., ::-1]).max() <= (8 if suffix == "jpg" else 3)


def test_a_profile_of_srgb_changes_nothing(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(SMOOTH).save(tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(rgb_of(tmp_path / "a.png"), SMOOTH)


@pytest.mark.parametrize("profile", [b"no profile", b"\0" * 200])
def test_a_damaged_profile_is_warned_of(tmp_path: Path, profile: bytes) -> None:
    Image.fromarray(SMOOTH).save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(UserWarning, match=r"color profile of a\.png is ignored"):
        assert np.array_equal(np.array(read_image(tmp_path / "a.png").rgb), SMOOTH)


def test_cmyk_and_lab(tmp_path: Path) -> None:
    white = Image.new("RGB", (48, 32), (255, 255, 255))
    white.paste((255, 0, 0), (0, 0, 24, 32))
    for name in ("a.jpg", "a.tif"):
        settings = {"quality": 100} if name == "a.jpg" else {}
        white.convert("CMYK").save(tmp_path / name, **settings)
        assert Image.open(tmp_path / name).mode == "CMYK"
        assert np.abs(rgb_of(tmp_path / name).astype(int) - np.array(white)).max() <= 3
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(white, srgb, lab, outputMode="LAB").save(tmp_path / "b.tif")
    assert Image.open(tmp_path / "b.tif").mode == "LAB"
    assert np.abs(rgb_of(tmp_path / "b.tif").astype(int) - np.array(white)).max() <= 6


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))


def long_text(path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    Image.fromarray(SMOOTH).save(path, pnginfo=info)


def broken_chunk(path: Path) -> None:
    Image.fromarray(SMOOTH).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:33] + b"\0\0\0\4\1\2\3\4junkjunk" + data[33:])


def too_large(path: Path) -> None:
    path.write_bytes(png_of(header(20_000, 9_500), chunk(b"IDAT", zlib.compress(b""))))


def cut_off(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:4000])


def bad_exif(path: Path) -> None:
    Image.fromarray(SMOOTH).save(path, exif=b"Exif\0\0XX*\0\0\0\0\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (long_text, "too much text"),
        (broken_chunk, "chunk|unknown format"),
        (too_large, r"too large.*190000000 pixels"),
        (cut_off, "truncated"),
        (empty, "empty, damaged or of an unknown format"),
        (bad_exif, "TIFF"),
    ],
)
def test_what_cannot_be_read_says_which_file_and_why(
    tmp_path: Path, make: Any, reason: str
) -> None:
    path = tmp_path / "photo.png"
    make(path)
    with pytest.raises(ValueError, match=rf"photo\.png cannot be read: .*({reason})"):
        read_image(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        read_image(tmp_path / "missing.png")


@pytest.mark.parametrize("make", [long_text, broken_chunk, too_large, empty])
def test_headers_that_cannot_be_read_say_so(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "photo.png"
    make(path)
    with pytest.raises(ValueError, match=r"photo\.png cannot be read"):
        read_size(path)


def test_the_size_of_a_png_file_needs_no_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert read_size(path) == (96, 64)


def test_an_orientation_after_the_pixels_of_a_png_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(SMOOTH).save(path)
    exif = Image.Exif()
    exif[274] = 6
    data = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + chunk + whole[-12:])
    assert read_size(path) == (32, 48) == read_image(path).rgb.size
