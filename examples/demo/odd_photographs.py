"""Write twelve photographs of odd sizes and file formats, with masks and targets.

python odd_photographs.py --output_dir my_photographs

They stand for the files that people have: turned by EXIF, with palettes, transparency, CMYK or 16
bits, and with masks of every kind. The layout is that of the Flux example, OUT/{src,mask,result}.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageFilter

from photographs import Array, load_photograph, resize
from scenes import compose

Write = Callable[[Array, Path], None]


def as_image(array: Array) -> Image.Image:
    """Return `(H, W)` or `(H, W, 3)`, in [0, 1], as an image of 8 bits."""
    return Image.fromarray(np.round(array * 255).astype(np.uint8))


def plain(array: Array, path: Path) -> None:
    """Write 8 bits, in the format that the suffix names."""
    as_image(array).save(path, quality=95)


def turned(array: Array, path: Path) -> None:
    """Write a photograph that a camera held upright has stored lying."""
    exif = Image.Exif()
    exif[274] = 6
    as_image(array).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def palette(array: Array, path: Path) -> None:
    """Write 256 colors."""
    as_image(array).quantize(256).save(path)


def rounded(array: Array, path: Path) -> None:
    """Write transparent corners."""
    image = as_image(array)
    rows, columns = np.ogrid[: image.height, : image.width]
    radius = 40
    down = np.maximum(radius - np.minimum(rows, image.height - 1 - rows), 0)
    right = np.maximum(radius - np.minimum(columns, image.width - 1 - columns), 0)
    image.putalpha(Image.fromarray((np.hypot(down, right) <= radius).astype(np.uint8) * 255))
    image.save(path)


def gray_16_bits(array: Array, path: Path) -> None:
    """Write one channel of 16 bits."""
    Image.fromarray(np.round(array.mean(2) * 65535).astype(np.uint16)).save(path)


def gray_floats(array: Array, path: Path) -> None:
    """Write one channel of floats in [0, 1]."""
    tifffile.imwrite(path, array.mean(2).astype(np.float32))


def gray(array: Array, path: Path) -> None:
    """Write one channel of 8 bits."""
    as_image(array.mean(2)).save(path)


def cmyk(array: Array, path: Path) -> None:
    """Write the inks of a print."""
    as_image(array).convert("CMYK").save(path, quality=95)


def black_and_white(mask: Array, path: Path) -> None:
    """Write a mask of one bit."""
    as_image(mask).convert("1").save(path)


def zeros_and_ones(mask: Array, path: Path) -> None:
    """Write a mask that looks black."""
    Image.fromarray((mask > 0).astype(np.uint8)).save(path)


def cut_out(mask: Array, path: Path) -> None:
    """Write a mask whose object is opaque, and all else transparent."""
    image = Image.new("RGBA", (mask.shape[1], mask.shape[0]), "red")
    image.putalpha(as_image(mask))
    image.save(path)


def soft(mask: Array, path: Path) -> None:
    """Write a mask with an antialiased edge."""
    as_image(mask).filter(ImageFilter.BoxBlur(0.5)).save(path)


def array_file(mask: Array, path: Path) -> None:
    """Write a mask as an array."""
    np.save(path, mask > 0)


# photograph: width, height, file and writer of the images, file and writer of the mask
PHOTOGRAPHS: dict[str, tuple[int, int, str, Write, str, Write]] = {
    "astronaut": (511, 597, "astronaut.jpg", turned, "astronaut.png", plain),
    "coffee": (601, 399, "coffee.png", palette, "coffee.png", zeros_and_ones),
    "chelsea": (451, 300, "chelsea.png", rounded, "chelsea_mask.png", plain),
    "camera": (777, 519, "camera.png", gray_16_bits, "camera.png", black_and_white),
    "china": (1283, 855, "china.jpg", cmyk, "china_M.jpg", plain),
    "motorcycle": (741, 493, "motorcycle.webp", plain, "motorcycle.png", cut_out),
    "rocket": (641, 427, "rocket.jpeg", plain, "rocket.jpg", plain),
    "flower": (333, 501, "flower.tif", plain, "flower.png", soft),
    "coins": (384, 303, "coins.png", gray, "coins.npy", array_file),
    "hubble": (1000, 872, "hubble.avif", plain, "hubble.bmp", plain),
    "retina": (617, 611, "retina.bmp", plain, "retina.webp", plain),
    "grass": (509, 700, "grass.tiff", gray_floats, "grass.png", plain),
}


def fitted(photograph: Array, width: int, height: int) -> Array:
    """Crop a photograph to an aspect ratio, around its center, and resize it."""
    rows, columns = photograph.shape[:2]
    kept = (min(rows, columns * height / width), min(columns, rows * width / height))
    top, left = (round((side - part) / 2) for side, part in zip((rows, columns), kept, strict=True))
    part = photograph[top : top + round(kept[0]), left : left + round(kept[1])]
    return resize(part, height, width)


def write_photograph(output: Path, index: int, name: str) -> None:
    """Put an object with its shadow into a photograph, and write source, mask and target."""
    width, height, file, write, mask_file, write_mask = PHOTOGRAPHS[name]
    rng = np.random.default_rng((3, index))
    target = fitted(load_photograph(name), width, height)
    side = min(width, height, 448)
    top, left = (int(rng.integers(0, length - side + 1)) for length in (height, width))
    place = np.s_[top : top + side, left : left + side]
    scene = compose(rng, target[place], target[place])
    source, mask = target.copy(), np.zeros((height, width), dtype=np.float32)
    source[place], mask[place] = scene.src, scene.mask
    for folder in ("src", "mask", "result"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    write(source.clip(0, 1), output / "src" / file)
    write(target, output / "result" / file)
    write_mask(mask, output / "mask" / mask_file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files.

    Raises:
        FileExistsError: when the folder is not empty.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    output: Path = parser.parse_args(arguments).output_dir
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"Expected a new folder as --output_dir, but {output} has files.")
    for index, name in enumerate(PHOTOGRAPHS):
        write_photograph(output, index, name)


if __name__ == "__main__":
    main()
