"""Compose removal scenes from one's own photographs and cut-outs of objects."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np

from effects import reflect
from kind_layers import Thing
from kinds import compose_kind
from mask_shapes import cover_as
from objects import cast_shadow
from photographs import Array, Rng, random_crop, resize
from scenes import Scene

sys.path.insert(0, str(Path(__file__).parents[1] / "flux_removal"))

from image_io.image_files import IMAGE_SUFFIXES
from image_io.reading import read_image

TEST_SHARE = 5
"""Every fifth photograph and object is for the test split."""


def list_images(folder: Path) -> list[Path]:
    """List the images in a folder and in its folders.

    Raises:
        FileNotFoundError: when there are none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"Expected images ({', '.join(IMAGE_SUFFIXES)}) in {folder}, but got none."
        )
    return found


def split_files(files: list[Path], split: str) -> list[Path]:
    """Return the files of a split, `"train"` or `"test"`; a single file is in both.

    Example:
        >>> [path.name for path in split_files([Path(name) for name in "abcdef"], "test")]
        ['a', 'f']
    """
    test = files[::TEST_SHARE]
    train = [path for path in files if path not in test]
    return test if split == "test" or not train else train


@lru_cache(maxsize=8)
def load_photograph(path: Path) -> Array:
    """Load a photograph as `(H, W, 3)`, float32 in [0, 1]."""
    return np.asarray(read_image(path).rgb, dtype=np.float32) / 255


@lru_cache(maxsize=64)
def load_cutout(path: Path) -> tuple[Array, Array]:
    """Load an object: colors `(h, w, 3)` and matte `(h, w)`, cropped to what is opaque.

    Raises:
        ValueError: when the image has no transparency, or nothing else.
    """
    loaded = read_image(path)
    if loaded.alpha is None:
        raise ValueError(
            f"Expected {path} to be a cut-out with a transparent background, but it is opaque."
        )
    alpha = np.asarray(loaded.alpha, dtype=np.float32) / 255
    rows, columns = np.flatnonzero((alpha > 0.5).any(1)), np.flatnonzero((alpha > 0.5).any(0))
    if not len(rows):
        raise ValueError(f"Expected an object in {path}, but it is transparent.")
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return (np.asarray(loaded.bare, dtype=np.float32) / 255)[box], alpha[box]


def place(
    cutout: tuple[Array, Array], size: int, foot: tuple[int, int], height: int
) -> tuple[Array, Array]:
    """Scale an object and lay it into a square.

    Args:
        cutout: colors `(h, w, 3)` and matte `(h, w)`.
        size: side of the square.
        foot: row and column of the middle of its lower edge.
        height: of the object in pixels.

    Returns:
        Colors `(size, size, 3)` and matte `(size, size)`; what lies outside is cut off.
    """
    colors, alpha = cutout
    width = max(1, round(alpha.shape[1] * height / alpha.shape[0]))
    # Colors are scaled with their matte: what is transparent has no color.
    solid = resize(np.repeat(alpha[..., None], 3, 2), height, width)
    scaled = resize(colors * alpha[..., None], height, width) / np.maximum(solid, 1 / 255)
    top, left = foot[0] - height, foot[1] - width // 2
    rgb, matte = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.float32)
    rows, columns = (
        slice(max(0, top), min(size, foot[0])),
        slice(max(0, left), min(size, left + width)),
    )
    inner = np.s_[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    part = scaled[inner].clip(0, 1)
    rgb[rows, columns] = part
    matte[rows, columns] = solid[inner][..., 0]
    return rgb, matte


def relight(rng: Rng, rgb: Array, alpha: Array, background: Array, light_x: float) -> Array:
    """Shade an object from the side of the light, and draw its color to that of the background.

        lit = rgb · (1 + a · (light_x · x - y)) · (mean of background / mean of object) ^ b

    with x and y from the middle of the object in halves of its extent, a in [0.1, 0.3], and b in
    [0.2, 0.6], the ratio per channel within [0.5, 2].
    """
    rows, columns = np.flatnonzero(alpha.max(1) > 0.5), np.flatnonzero(alpha.max(0) > 0.5)
    size = alpha.shape[0]
    ys = (np.arange(size) - rows.mean()) / max(np.ptp(rows) / 2, 1)
    xs = (np.arange(size) - columns.mean()) / max(np.ptp(columns) / 2, 1)
    shade = 1 + rng.uniform(0.1, 0.3) * (light_x * xs[None] - ys[:, None]).clip(-1.5, 1.5)
    inside = alpha > 0.5
    ratio = (background.mean((0, 1)) / np.maximum(rgb[inside].mean(0), 0.02)).clip(0.5, 2)
    lit: Array = rgb * shade[..., None] * ratio ** rng.uniform(0.2, 0.6)
    return lit.clip(0, 1).astype(np.float32)


def draw_own(rng: Rng, background: Array, cutout: tuple[Array, Array], name: str = "") -> Thing:
    """Lay an object into a background, flipped at random, and light it.

    Args:
        background: `(S, S, 3)`, in [0, 1].
        cutout: of `load_cutout`.
        name: of the object.
    """
    size = background.shape[0]
    if rng.random() < 0.5:
        cutout = (cutout[0][:, ::-1], cutout[1][:, ::-1])
    ratio = cutout[1].shape[1] / cutout[1].shape[0]
    height = size * float(np.exp(rng.uniform(np.log(0.15), np.log(0.5)))) / max(1.0, ratio)
    reach = ratio * height / 2
    foot_row = round(rng.uniform(max(0.45 * size, height), 0.92 * size))
    foot_column = round(rng.uniform(reach, max(size - reach, reach + 1)))
    light_x = float(rng.choice((-1, 1)) * rng.uniform(0.4, 0.8))
    rgb, alpha = place(cutout, size, (foot_row, foot_column), max(4, round(height)))
    rgb = relight(rng, rgb, alpha, background, light_x)
    middle = (foot_row - height / 2, float(foot_column))
    return Thing(rgb, alpha, middle, height / 2, light_x, name)


def compose_own(
    rng: Rng, background: Array, ref: Array, cutout: tuple[Array, Array], mask_kind: str
) -> Scene:
    """Compose an object with light, shadow and an occasional reflection on a background.

        result = background
        shadowed = (1 - reflection) · (1 - shadow · (1 - strength)) · background
                   + reflection · reflected object
        src = alpha · object + (1 - alpha) · shadowed

    Args:
        background: `(S, S, 3)`, in [0, 1].
        ref: `(S, S, 3)`, in [0, 1]; handed through.
        cutout: of `load_cutout`.
        mask_kind: one of `OWN_MASK_KINDS`; the mask leaves shadow and reflection.
    """
    size = background.shape[0]
    thing = draw_own(rng, background, cutout)
    rgb, alpha = thing.rgb, thing.alpha
    shadow = cast_shadow(rng, alpha, thing.middle, thing.radius, thing.light_x, blur=size / 128)
    shadowed = background * (1 - shadow * np.float32(rng.uniform(0.35, 0.65)))[..., None]
    if rng.random() < 0.3:
        mirrored, strength = reflect(rng, rgb, alpha, round(thing.middle[0] + thing.radius))
        shadowed = shadowed * (1 - strength[..., None]) + mirrored * strength[..., None]
    src = alpha[..., None] * rgb + (1 - alpha[..., None]) * shadowed
    mask = cover_as(rng, alpha, mask_kind)
    return Scene(
        src=src.astype(np.float32),
        mask=mask.astype(np.float32),
        result=background.astype(np.float32),
        ref=ref.astype(np.float32),
        shadowed=shadowed.astype(np.float32),
        shadow=shadow,
        alpha=alpha,
        mask_kind=mask_kind,
        object_kind="",
        photograph="",
    )


class OwnScenes:
    """Draw scenes from folders of photographs and cut-outs.

    Args:
        photographs: a folder of images.
        objects: a folder of images with a transparent background.

    Raises:
        FileNotFoundError: when a folder holds no images.
        ValueError: when there are less than two photographs, or an object is opaque.
    """

    def __init__(self, photographs: Path, objects: Path) -> None:
        self.photographs, self.objects = list_images(photographs), list_images(objects)
        if len(self.photographs) < 2:
            raise ValueError(
                f"Expected two or more photographs in {photographs}, one for each split, but got "
                f"{len(self.photographs)}."
            )
        for path in self.objects:
            load_cutout(path)

    def stamp(self) -> str:
        """Return a hash of the files that scenes are made of."""
        states = [(str(path), path.stat().st_size) for path in self.photographs + self.objects]
        return hashlib.sha256(repr(states).encode()).hexdigest()

    def draw(
        self, rng: Rng, split: str, size: int, mask_kind: str, kind: str | None = None
    ) -> Scene:
        """Draw a scene of a split; of a kind of `kinds.KINDS`, or with shadow and reflections."""
        files = [split_files(paths, split) for paths in (self.photographs, self.objects)]
        photograph, thing = (paths[int(rng.integers(len(paths)))] for paths in files)
        image = load_photograph(photograph)
        background, ref = (random_crop(rng, image, size) for _ in range(2))
        cutout = load_cutout(thing)
        if kind is None:
            scene = compose_own(rng, background, ref, cutout, mask_kind)
            return dataclasses.replace(scene, photograph=photograph.name, object_kind=thing.name)
        return compose_kind(
            rng,
            kind,
            background,
            ref,
            cover=lambda rng, alpha: cover_as(rng, alpha, mask_kind),
            draw=lambda rng, background: draw_own(rng, background, cutout, thing.name),
            mask_kind=mask_kind,
            photograph=photograph.name,
        )
