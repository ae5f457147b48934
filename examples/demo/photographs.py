"""Load the bundled photographs, split by photograph, and cut random pieces from them.

Images are `(H, W, 3)`, float32 in [0, 1]. What is random comes from the generator that is given.
"""

from __future__ import annotations

import importlib.resources
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Array = NDArray[Any]
Rng = np.random.Generator

# The split is by photograph: no part of a test photograph is ever seen in training.
TRAIN_PHOTOGRAPHS: dict[str, tuple[str, str]] = {
    "astronaut": ("skimage.data", "astronaut.png"),
    "motorcycle": ("skimage.data", "motorcycle_left.png"),
    "rocket": ("skimage.data", "rocket.jpg"),
    "flower": ("sklearn.datasets.images", "flower.jpg"),
    "retina": ("skimage.data", "retina.jpg"),
    "ihc": ("skimage.data", "ihc.png"),
    "hubble": ("skimage.data", "hubble_deep_field.jpg"),
    "camera": ("skimage.data", "camera.png"),
    "coins": ("skimage.data", "coins.png"),
    "moon": ("skimage.data", "moon.png"),
    "brick": ("skimage.data", "brick.png"),
    "grass": ("skimage.data", "grass.png"),
    "gravel": ("skimage.data", "gravel.png"),
}
TEST_PHOTOGRAPHS: dict[str, tuple[str, str]] = {
    "coffee": ("skimage.data", "coffee.png"),
    "chelsea": ("skimage.data", "chelsea.png"),
    "china": ("sklearn.datasets.images", "china.jpg"),
}
# Relative frequency of each photograph in training crops; natural, colorful ones are more frequent.
TRAIN_WEIGHTS: dict[str, float] = {
    "astronaut": 4.0,
    "motorcycle": 4.0,
    "rocket": 2.5,
    "flower": 3.0,
    "retina": 0.7,
    "ihc": 1.0,
    "hubble": 0.4,
    "camera": 1.0,
    "coins": 0.6,
    "moon": 0.6,
    "brick": 1.0,
    "grass": 0.8,
    "gravel": 0.8,
}


def photographs(split: str) -> tuple[str, ...]:
    """Return the names of the photographs of a split, `"train"` or `"test"`.

    >>> photographs("test")
    ('coffee', 'chelsea', 'china')
    """
    if split not in ("train", "test"):
        raise ValueError(f'Expected `split` to be "train" or "test", but got {split!r}.')
    return tuple(TRAIN_PHOTOGRAPHS if split == "train" else TEST_PHOTOGRAPHS)


@lru_cache(maxsize=32)
def load_photograph(name: str) -> Array:
    """Load a bundled photograph as `(H, W, 3)`, float32 in [0, 1]; gray ones become RGB."""
    source = {**TRAIN_PHOTOGRAPHS, **TEST_PHOTOGRAPHS}.get(name)
    if source is None:
        known = sorted({*TRAIN_PHOTOGRAPHS, *TEST_PHOTOGRAPHS})
        raise ValueError(f"Expected `name` to be one of {known}, but got {name!r}.")
    with importlib.resources.files(source[0]).joinpath(source[1]).open("rb") as file:
        photograph = Image.open(file).convert("RGB")
    if name == "retina":  # outside of the disk there is only black
        side = photograph.width
        photograph = photograph.crop((side // 6, side // 6, side - side // 6, side - side // 6))
        photograph = photograph.resize((512, 512), Image.Resampling.LANCZOS)
    array = np.asarray(photograph, dtype=np.float32) / np.float32(255)
    array.setflags(write=False)
    return array


@lru_cache(maxsize=1)
def coin_boxes() -> tuple[tuple[slice, slice], ...]:
    """Find the 24 coins of the photograph `coins`, as slices of its rows and columns."""
    bright = ndimage.binary_closing(load_photograph("coins")[..., 0] > 0.5, iterations=2)
    solid = ndimage.binary_opening(ndimage.binary_fill_holes(bright), iterations=4)
    boxes = ndimage.find_objects(ndimage.label(solid)[0])
    return tuple((rows, columns) for rows, columns in boxes if rows.stop - rows.start > 30)


def resize(image: Array, height: int, width: int) -> Array:
    """Resize `(H, W, 3)` with antialiasing to `(height, width, 3)`, clipped to [0, 1]."""
    resized = Image.fromarray((image * 255 + 0.5).astype(np.uint8))
    resized = resized.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.float32) / np.float32(255)


def random_crop(
    rng: Rng, photograph: Array, size: int, *, min_std: float = 0.02, min_mean: float = 0.0
) -> Array:
    """Cut a random square at a random scale, flipped at random, and resize it to `size`.

    Args:
        photograph: `(H, W, 3)`, in [0, 1].
        min_std: least standard deviation of the crop; flatter ones are drawn again.
        min_mean: least mean brightness of the crop; darker ones are drawn again.

    Returns:
        `(size, size, 3)`; the best of 20 draws when none satisfies both limits.
    """
    height, width = photograph.shape[:2]
    best, best_score = photograph, -np.inf
    for _ in range(20):
        largest = min(height, width)
        side = round(largest * float(np.exp(rng.uniform(np.log(min(1.0, size / largest)), 0.0))))
        top = int(rng.integers(0, height - side + 1))
        left = int(rng.integers(0, width - side + 1))
        crop = photograph[top : top + side, left : left + side]
        sparse = crop[:: max(1, side // 64), :: max(1, side // 64)]
        score = min(float(sparse.std()) - min_std, float(sparse.mean()) - min_mean)
        if score > best_score:
            best, best_score = crop, score
        if score >= 0:
            break
    if rng.random() < 0.5:
        best = best[:, ::-1]
    return resize(best, size, size)


def jitter_colors(rng: Rng, image: Array) -> Array:
    """Change gain per channel, gamma and, at times, the order of channels or the tint."""
    image = image ** np.float32(np.exp(rng.uniform(-0.3, 0.3)))
    gray = bool(np.abs(image - image.mean(2, keepdims=True)).max() < 0.01)
    gain = rng.uniform(0.55, 1.1, 3) if gray else rng.uniform(0.85, 1.12, 3)
    if not gray and rng.random() < 0.4:
        image = image[..., rng.permutation(3)]
    return (image * gain.astype(np.float32)).clip(0, 1)


def random_photograph(rng: Rng, split: str) -> str:
    """Draw the name of a photograph of a split; training ones by their weight."""
    names = photographs(split)
    weights = np.array([TRAIN_WEIGHTS.get(name, 1.0) for name in names])
    return str(rng.choice(names, p=weights / weights.sum()))
