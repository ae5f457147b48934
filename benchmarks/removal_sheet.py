"""The contact sheet of `removal.py`: test scenes across, what every row made of them down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS, SCALE = 6, 2
MARGIN, HEADER = 6, 26
TINT = (255, 26, 77)


def masked(source: Path, mask: Path) -> Image.Image:
    """Lay a mask over its image as a red tint."""
    with Image.open(source) as image, Image.open(mask) as shown:
        strength = shown.convert("L").point(lambda value: round(0.6 * value))
        rgb = image.convert("RGB")
        return Image.composite(Image.new("RGB", rgb.size, TINT), rgb, strength)


def chosen_scenes(data: Path) -> list[str]:
    """Return the stems of scenes from small to large masks, at even distances."""
    areas = {}
    for path in sorted((data / "mask").glob("*.png")):
        with Image.open(path) as mask:
            areas[path.stem] = float(np.asarray(mask.convert("L")).mean())
    order = sorted(areas, key=areas.__getitem__)
    groups = np.array_split(np.arange(len(order)), min(COLUMNS, len(order)))
    return [order[int(group[len(group) // 2])] for group in groups]


def draw_sheet(data: Path, predictions: Mapping[str, Path], path: Path) -> None:
    """Write the sheet.

    Args:
        data: the test scenes; holds the folders src, mask and result.
        predictions: folders of images by the titles of their rows; incomplete ones are left out.
        path: of the PNG file.
    """
    stems = chosen_scenes(data)
    rows: dict[str, list[Image.Image]] = {
        "source": [Image.open(data / "src" / f"{stem}.png") for stem in stems],
        "mask": [
            masked(data / "src" / f"{stem}.png", data / "mask" / f"{stem}.png") for stem in stems
        ],
    }
    for title, folder in {**predictions, "target": data / "result"}.items():
        files = [folder / f"{stem}.png" for stem in stems]
        if all(file.is_file() for file in files):
            rows[title] = [Image.open(file) for file in files]
    font = ImageFont.load_default(size=16)
    width, height = (SCALE * side for side in rows["source"][0].size)
    indent = round(max(font.getlength(title) for title in rows)) + MARGIN
    size = (
        indent + len(stems) * (width + MARGIN) + MARGIN,
        HEADER + len(rows) * (height + MARGIN) + MARGIN,
    )
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, (title, images) in enumerate(rows.items()):
        top = HEADER + MARGIN + row * (height + MARGIN)
        pen.text((MARGIN, top + height / 2), title, fill="black", font=font, anchor="lm")
        for column, (stem, image) in enumerate(zip(stems, images, strict=True)):
            left = indent + MARGIN + column * (width + MARGIN)
            if row == 0:
                middle = (left + width / 2, HEADER / 2)
                pen.text(middle, stem, fill="black", font=font, anchor="mm")
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(enlarged, (left, top))
    sheet.save(path)
