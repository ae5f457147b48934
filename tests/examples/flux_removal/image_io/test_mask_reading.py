"""Masks of any kind are read as 0 and 1, or the error names the file and the reason."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from image_io.mask_reading import read_mask
from image_io.options import ReadingOptions

SIZE = (48, 32)
OBJECT = np.zeros((32, 48), dtype=bool)
OBJECT[8:24, 12:30] = True


def read(path: Path, size: tuple[int, int] = SIZE, **options: Any) -> np.ndarray:
    found = read_mask(path, size, ReadingOptions(**options))
    assert found.dtype == bool
    assert found.shape == size[::-1]
    return found


def save(tmp_path: Path, values: Any, name: str = "mask.png", **settings: Any) -> Path:
    image = values if isinstance(values, Image.Image) else Image.fromarray(np.asarray(values))
    image.save(tmp_path / name, **settings)
    return tmp_path / name


def palette(indices: np.ndarray, colors: list[int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8)).convert("P")
    image.putdata(indices.astype(np.uint8).ravel().tolist())
    image.putpalette(colors)
    return image


VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(OBJECT),
        Image.fromarray(OBJECT.astype(np.uint8)),
        Image.fromarray(OBJECT.astype(np.uint8) * 255),
        Image.fromarray(OBJECT.astype(np.uint8) * 38),
        Image.fromarray(OBJECT.astype(np.uint16)),
        Image.fromarray(OBJECT.astype(np.uint16) * 255),
        Image.fromarray(OBJECT.astype(np.uint16) * 65535),
        Image.fromarray(OBJECT.astype(np.uint8) * 255).convert("RGB"),
        Image.fromarray(OBJECT.astype(np.uint8)).convert("RGB"),
        Image.fromarray(OBJECT[..., None] * np.array([255, 0, 0], np.uint8)),
        Image.fromarray(OBJECT[..., None] * np.array([0, 0, 90], np.uint8)),
        palette(OBJECT, [0, 0, 0, 255, 255, 255]),
        palette(~OBJECT, [255, 255, 255, 0, 0, 0]),
        palette(OBJECT, VOC),
        Image.fromarray(OBJECT.astype(np.uint8) * 255).convert("RGBA"),
    ],
    ids=lambda image: image.mode,
)
def test_white_on_black_in_any_form(tmp_path: Path, image: Image.Image) -> None:
    assert np.array_equal(read(save(tmp_path, image)), OBJECT)


@pytest.mark.parametrize("values", [np.zeros((32, 48)), np.ones((32, 48))])
@pytest.mark.parametrize("scale", [1, 255])
def test_empty_and_full_masks(tmp_path: Path, values: np.ndarray, scale: int) -> None:
    path = save(tmp_path, (values * scale).astype(np.uint8))
    assert np.array_equal(read(path), values > 0)


@pytest.mark.parametrize("color", ["white", "black", "noise"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_alpha_channel_is_a_mask(tmp_path: Path, color: str, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    image = Image.fromarray(noise) if color == "noise" else Image.new("RGB", SIZE, color)
    image.putalpha(Image.fromarray(OBJECT.astype(np.uint8) * 255))
    if mode == "P" and color == "noise":
        pytest.skip("few colors change the alpha channel")
    converted = image.quantize(16) if mode == "P" else image.convert(mode)
    assert np.array_equal(read(save(tmp_path, converted)), OBJECT)


def test_two_masks_in_a_file_are_an_error(tmp_path: Path) -> None:
    image = Image.fromarray(OBJECT.astype(np.uint8) * 255).convert("RGB")
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (40, 0, 48, 32))
    image.putalpha(alpha)
    with pytest.raises(ValueError, match=r"mask\.png cannot be read: its alpha .* both a mask"):
        read(save(tmp_path, image))


LABELS = np.zeros((32, 48), dtype=int)
LABELS[4:12, 4:20] = 1
LABELS[16:28, 10:40] = 2
LABELS[14:16, 10:40] = 255


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "npy"])
def test_labels_have_to_be_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("mask.npy" if kind == "npy" else "mask.png")
    if kind == "npy":
        np.save(path, LABELS)
    elif kind == "P":
        palette(LABELS, VOC + [0] * 756).save(path)
    else:
        Image.fromarray(LABELS.astype(np.uint16 if kind == "I;16" else np.uint8)).save(path)
    for label in (0, 1, 2, 255):
        assert np.array_equal(read(path, mask_label=label), label == LABELS)
    with pytest.raises(ValueError, match=r"0, 1, 2, 255.*--mask_label"):
        read(path)
    with pytest.raises(ValueError, match=r"no label 7; its labels are 0, 1, 2, 255"):
        read(path, mask_label=7)


def test_labels_without_the_object_of_any_border_have_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0, 1, 2\. .*--mask_label"):
        read(save(tmp_path, np.where(LABELS == 255, 0, LABELS).astype(np.uint8)))


def test_colors_have_no_labels(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(OBJECT.astype(np.uint8) * 255).convert("RGB"))
    with pytest.raises(ValueError, match="no labels"):
        read(path, mask_label=1)
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
    with pytest.raises(ValueError, match=r"it has colors \(3\)"):
        read(save(tmp_path, colors[np.minimum(LABELS, 2)]))


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif"])
def test_noise_of_compression_is_forgiven(tmp_path: Path, quality: int, suffix: str) -> None:
    drawing = Image.new("L", (192, 128))
    ImageDraw.Draw(drawing).ellipse((30, 20, 140, 110), fill=255)
    path = save(tmp_path, drawing, f"mask.{suffix}", quality=quality)
    wrong = read(path, (192, 128)) ^ (np.array(drawing) > 0)
    assert wrong.mean() < 0.003


def test_noise_of_compression_in_a_png_is_forgiven(tmp_path: Path) -> None:
    buffer, drawing = io.BytesIO(), Image.new("L", (192, 128))
    drawing.paste(255, (32, 32, 96, 96))
    drawing.save(buffer, "JPEG", quality=90)
    path = save(tmp_path, Image.open(buffer))
    assert np.array_equal(read(path, (192, 128)), np.array(drawing) > 0)


@pytest.mark.parametrize("mode", ["L", "RGB", "alpha", "npy"])
def test_antialiased_edges_are_cut_at_half(tmp_path: Path, mode: str) -> None:
    large = Image.new("L", (192 * 4, 128 * 4))
    ImageDraw.Draw(large).ellipse((100, 60, 500, 400), fill=255)
    soft = large.resize((192, 128), Image.Resampling.BOX)
    assert len(np.unique(np.array(soft))) > 3
    if mode == "npy":
        np.save(tmp_path / "mask.npy", np.array(soft) / 255)
        path = tmp_path / "mask.npy"
    elif mode == "alpha":
        image = Image.new("RGB", soft.size, "white")
        image.putalpha(soft)
        path = save(tmp_path, image)
    else:
        path = save(tmp_path, soft.convert(mode))
    assert np.array_equal(read(path, (192, 128)), np.array(soft) >= 128)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_gray_areas_are_an_error_or_are_cut(tmp_path: Path, suffix: str) -> None:
    values = np.tile(np.linspace(0, 255, 192), (128, 1)).astype(np.uint8)
    path = save(tmp_path, values, f"mask.{suffix}")
    with pytest.raises(ValueError, match=r"gray.*--threshold_mask"):
        read(path, (192, 128))
    wrong = read(path, (192, 128), threshold_mask=True) ^ (values >= 128)
    assert wrong.mean() < 0.01
    noise = np.random.default_rng(0).integers(0, 256, (128, 192), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"gray.*--threshold_mask"):
        read(save(tmp_path, noise, f"mask.{suffix}"), (192, 128))


def test_shades_of_few_values_are_cut_when_asked(tmp_path: Path) -> None:
    path = save(tmp_path, np.where(OBJECT, 200, np.arange(48) // 16 * 20).astype(np.uint8))
    with pytest.raises(ValueError, match="--threshold_mask"):
        read(path)
    assert np.array_equal(read(path, threshold_mask=True), OBJECT)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float32"])
@pytest.mark.parametrize("shape", [(32, 48), (1, 32, 48), (32, 48, 1)])
def test_arrays(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "mask.npy", OBJECT.astype(dtype).reshape(shape))
    assert np.array_equal(read(tmp_path / "mask.npy"), OBJECT)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 32, 48)), "shape"),
        (np.full((32, 48), "a"), "numbers"),
        (np.full((32, 48), None), "allow_pickle|pickle"),
        (np.where(OBJECT, 3.0, -4.0), "from -4.0 to 3.0"),
        (np.full((32, 48), np.nan), "are those of no mask"),
    ],
)
def test_arrays_that_are_no_masks(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "mask.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"mask\.npy cannot be read: .*({reason})"):
        read(tmp_path / "mask.npy")


POLYGON = [12, 8, 30, 8, 30, 24, 12, 24]


def counts(mask: np.ndarray) -> list[int]:
    """Run lengths in column order, beginning with zeros, by a plain loop."""
    found, value = [0], False
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            found.append(0)
            value = pixel
        found[-1] += 1
    return found


RLE = {"size": [32, 48], "counts": counts(OBJECT)}
COCO = {
    "images": [
        {"id": 1, "file_name": "other.jpg", "width": 5, "height": 5},
        {"id": 2, "file_name": "photos/photo.jpg", "width": 48, "height": 32},
    ],
    "annotations": [
        {"image_id": 1, "category_id": 3, "segmentation": [[0, 0, 5, 0, 5, 5, 0, 5]]},
        {"image_id": 2, "category_id": 3, "segmentation": [POLYGON]},
        {"image_id": 2, "category_id": 4, "segmentation": [[0, 0, 4, 0, 4, 4, 0, 4]]},
    ],
}


@pytest.mark.parametrize(
    "data",
    [RLE, {"segmentation": RLE}, [RLE], [POLYGON], POLYGON, {"segmentation": [POLYGON]}],
    ids=["rle", "annotation", "rles", "polygons", "polygon", "annotation of polygons"],
)
def test_coco_annotations(tmp_path: Path, data: Any) -> None:
    pytest.importorskip("pycocotools")
    (tmp_path / "mask.json").write_text(json.dumps(data))
    assert np.array_equal(read(tmp_path / "mask.json"), OBJECT)


def test_compressed_coco_annotations(tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    rle = coco.encode(np.asfortranarray(OBJECT.astype(np.uint8)))
    (tmp_path / "mask.json").write_text(json.dumps(rle | {"counts": rle["counts"].decode()}))
    assert np.array_equal(read(tmp_path / "mask.json"), OBJECT)


def test_a_coco_file_has_the_annotations_of_many_images(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    path, image = tmp_path / "mask.json", tmp_path / "photo.jpg"
    path.write_text(json.dumps(COCO))
    every = read_mask(path, SIZE, ReadingOptions(), image=image)
    assert every.sum() == OBJECT.sum() + 16
    chosen = read_mask(path, SIZE, ReadingOptions(mask_label=3), image=image)
    assert np.array_equal(chosen, OBJECT)
    none = read_mask(path, SIZE, ReadingOptions(mask_label=9), image=image)
    assert not none.any()
    with pytest.raises(ValueError, match=r"describes 2 images, but none of them is a\.png"):
        read_mask(path, SIZE, ReadingOptions(), image=tmp_path / "a.png")


def test_coco_without_its_package_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    (tmp_path / "mask.json").write_text(json.dumps(RLE))
    with pytest.raises(ValueError, match=r"mask\.json cannot be read: .*pip install pycocotools"):
        read(tmp_path / "mask.json")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"counts": [1]}', '"a"'])
def test_json_that_is_no_annotation(tmp_path: Path, text: str) -> None:
    (tmp_path / "mask.json").write_text(text)
    with pytest.raises(ValueError, match=r"mask\.json cannot be read"):
        read(tmp_path / "mask.json")


def test_masks_are_inverted(tmp_path: Path) -> None:
    path = save(tmp_path, (~OBJECT).astype(np.uint8) * 255)
    assert np.array_equal(read(path, invert_mask=True), OBJECT)


@pytest.mark.parametrize("pixels", [1, 3, 7])
def test_masks_grow_by_pixels(tmp_path: Path, pixels: int) -> None:
    path = save(tmp_path, OBJECT.astype(np.uint8) * 255)
    expected = ndimage.distance_transform_edt(~OBJECT) <= pixels
    assert np.array_equal(read(path, grow_mask=pixels), expected)
    inverted = read(path, grow_mask=pixels, invert_mask=True)
    assert np.array_equal(inverted, ndimage.distance_transform_edt(OBJECT) <= pixels)


def test_masks_of_another_size(tmp_path: Path) -> None:
    path = save(tmp_path, OBJECT.astype(np.uint8))
    with pytest.raises(ValueError, match=r"96x64, but got 48x32.*--resize_mask.*mask\.png"):
        read(path, (96, 64))
    assert np.array_equal(read(path, (96, 64), resize_mask=True), OBJECT.repeat(2, 0).repeat(2, 1))
    with pytest.raises(ValueError, match="sides are swapped"):
        read(path, (32, 48), resize_mask=True)


def test_a_turned_mask_is_read_upright(tmp_path: Path) -> None:
    exif, image = Image.Exif(), Image.fromarray(OBJECT.astype(np.uint8) * 255)
    exif[274] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    assert np.array_equal(read(save(tmp_path, turned, exif=exif.tobytes())), OBJECT)


def test_a_profile_does_not_change_a_mask(tmp_path: Path) -> None:
    image = Image.fromarray(OBJECT.astype(np.uint8))
    assert np.array_equal(read(save(tmp_path, image, icc_profile=b"no profile")), OBJECT)


@pytest.mark.parametrize("content", [b"", b"no image"])
@pytest.mark.parametrize("suffix", ["png", "npy", "json", "jpg"])
def test_unreadable_masks_are_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"mask.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"mask\.{suffix} cannot be read: \S"):
        read(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        read(tmp_path / "missing.png")
