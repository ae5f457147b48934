"""Photographs of Debian packages, for training the bundled model.

    apt-get download gcompris-qt-data palapeli-data plasma-workspace-wallpapers
    for package in *.deb; do dpkg-deb --extract "$package" PHOTOGRAPHS; done

Licenses are those of `debian/copyright` in each package:

- `gcompris-qt-data` 3.1-2: photographs of animals, buildings, tools and the sea in the folders
  `ACTIVITIES`. Every file has its own entry: CC BY 1.0 to 3.0, CC BY-SA 2.0 to 4.0, CC0, GFDL 1.2,
  GPL 2 or 3, or public domain. Files without an entry: GPL 3 or later, as the program.
- `palapeli-data` 4:22.12.3-1: five photographs. The package: GPL 2 or later. The files beside the
  photographs: public domain (bridge, citrus fruits, honey bee) and GFDL (castle, chameleon).
- `plasma-workspace-wallpapers` 4:5.27.5-2: the photographs `WALLPAPERS`. GPL 2 or later.

None of them shows what a test photograph shows.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

SHORT_SIDE = 420
SMALLEST = 200
# Folders of GCompris resource files that hold photographs, and in them what is none, or unfit.
ACTIVITIES = (
    "categorization",
    "clickgame",
    "details",
    "erase",
    "explore_farm_animals",
    "explore_monuments",
    "explore_world_animals",
    "explore_world_music",
)
LEFT_OUT = ("/alphabets/", "/numbers/", "/others/cup", "Gogh", "Auvers", "PereTanguy")
WALLPAPERS = (
    "BytheWater",
    "ColdRipple",
    "ColorfulCups",
    "DarkestHour",
    "EveningGlow",
    "FallenLeaf",
    "Grey",
    "Kite",
    "OneStandsOut",
    "Path",
    "Volna",
    "summer_1am",
)


def read_resources(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of the uncompressed files in a Qt resource file (`.rcc`)."""
    data = path.read_bytes()
    magic, version, tree, contents, names = struct.unpack_from(">4s4I", data)
    if magic != b"qres" or version not in (2, 3):
        raise ValueError(f"Expected {path} to be a Qt resource file of version 2 or 3.")
    folders = [(0, "")]
    while folders:
        node, folder = folders.pop()
        count, first = struct.unpack_from(">2I", data, tree + 22 * node + 6)
        for child in range(first, first + count):
            name_at, flags = struct.unpack_from(">IH", data, tree + 22 * child)
            (length,) = struct.unpack_from(">H", data, names + name_at)
            start = names + name_at + 6
            name = folder + data[start : start + 2 * length].decode("utf-16-be")
            if flags & 2:
                folders.append((child, name + "/"))
            elif not flags & 5:
                start = contents + struct.unpack_from(">I", data, tree + 22 * child + 10)[0]
                (size,) = struct.unpack_from(">I", data, start)
                yield name, data[start + 4 : start + 4 + size]


def _decode(data: bytes) -> NDArray[np.uint8] | None:
    """Decode an image as `(H, W, 3)` of at most `SHORT_SIDE`; None where it is none or small."""
    try:
        with Image.open(io.BytesIO(data)) as file:
            if min(file.size) < SMALLEST:
                return None
            opaque = Image.alpha_composite(
                Image.new("RGBA", file.size, "white"), file.convert("RGBA")
            )
    except UnidentifiedImageError:  # sounds, scripts and drawings lie among the photographs
        return None
    scale = min(1.0, SHORT_SIDE / min(opaque.size))
    size = (round(opaque.width * scale), round(opaque.height * scale))
    return np.asarray(opaque.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def read_photographs(folder: Path) -> list[NDArray[np.uint8]]:
    """Read the photographs of the packages extracted to `folder`, each `(H, W, 3)`, in 0-255.

    Raises:
        FileNotFoundError: if a package is not there.
    """
    files: list[bytes] = []
    for activity in ACTIVITIES:
        resources = folder / "usr/share/gcompris-qt/rcc" / f"{activity}.rcc"
        found = sorted(read_resources(resources))
        files += [data for name, data in found if not any(part in name for part in LEFT_OUT)]
    for name in WALLPAPERS:
        images = sorted((folder / "usr/share/wallpapers" / name / "contents/images").iterdir())
        files.append(max(images, key=lambda path: path.stat().st_size).read_bytes())
    puzzles = sorted((folder / "usr/share/palapeli/collection").glob("*.jpg"))
    if not puzzles:
        raise FileNotFoundError(f"Expected photographs of palapeli-data in {folder}.")
    decoded = [_decode(data) for data in [*files, *(path.read_bytes() for path in puzzles)]]
    return [photograph for photograph in decoded if photograph is not None]
