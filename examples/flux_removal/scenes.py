"""Compose removal scenes from real photographs: an object with its shadow, a mask, the clean truth.

Every function is pure: what is random comes from the `numpy.random.Generator` that it is given.
Images are `(H, W, 3)` and maps `(H, W)`, float32 in [0, 1].
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Array = NDArray[np.float32]
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
# How often a training crop comes from a photograph; what is natural and colourful comes more often.
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
CUTOUT_PHOTOGRAPHS = ("astronaut", "motorcycle", "flower", "ihc", "retina", "rocket")
MASK_KINDS = ("blob", "stroke", "box")
OBJECT_KINDS = ("cutout", "coin", "sphere", "box", "capsule", "cone")


@dataclass(frozen=True)
class Scene:
    """Hold one removal scene; images `(S, S, 3)`, maps `(S, S)`, all float32 in [0, 1]."""

    src: Array
    mask: Array
    result: Array
    ref: Array
    shadowed: Array
    shadow: Array
    alpha: Array
    mask_kind: str
    object_kind: str
    photograph: str


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
    """Load a bundled photograph as `(H, W, 3)`, float32 in [0, 1]; grey ones become RGB."""
    source = {**TRAIN_PHOTOGRAPHS, **TEST_PHOTOGRAPHS}.get(name)
    if source is None:
        known = sorted({*TRAIN_PHOTOGRAPHS, *TEST_PHOTOGRAPHS})
        raise ValueError(f"Expected `name` to be one of {known}, but got {name!r}.")
    with importlib.resources.files(source[0]).joinpath(source[1]).open("rb") as file:
        picture = Image.open(file).convert("RGB")
    if name == "retina":  # outside of the disk there is only black
        side = picture.width
        picture = picture.crop((side // 6, side // 6, side - side // 6, side - side // 6))
        picture = picture.resize((512, 512), Image.Resampling.LANCZOS)
    array = np.asarray(picture, dtype=np.float32) / 255
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
    picture = Image.fromarray(np.round(image * 255).clip(0, 255).astype(np.uint8))
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture, dtype=np.float32) / 255


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


def jitter_colours(rng: Rng, image: Array) -> Array:
    """Change gain per channel, gamma and, at times, the order of channels or the tint."""
    image = image ** np.float32(np.exp(rng.uniform(-0.3, 0.3)))
    grey = bool(np.abs(image - image.mean(2, keepdims=True)).max() < 0.01)
    gain = rng.uniform(0.55, 1.1, 3) if grey else rng.uniform(0.85, 1.12, 3)
    if not grey and rng.random() < 0.4:
        image = image[..., rng.permutation(3)]
    return (image * gain.astype(np.float32)).clip(0, 1)


def smooth_noise(rng: Rng, size: int, sigma: float) -> Array:
    """Return Gaussian noise of `(size, size)`, blurred by `sigma` pixels, of unit variance."""
    noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), sigma, mode="wrap")
    return (noise / max(float(noise.std()), 1e-6)).astype(np.float32)


def _grid(size: int, centre: tuple[float, float]) -> tuple[Array, Array]:
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    return ys - centre[0], xs - centre[1]


def _step(distance: Array, softness: float = 1.0) -> Array:
    """Return an antialiased inside: 1 where `distance` (pixels) is negative, 0 where positive."""
    return (0.5 - distance / softness).clip(0, 1).astype(np.float32)


def blob(rng: Rng, size: int, centre: tuple[float, float], radius: float) -> Array:
    """Return the matte of a smooth, star-shaped blob of mean `radius` pixels."""
    ys, xs = _grid(size, centre)
    angle = np.arctan2(ys, xs)
    contour = np.full_like(angle, radius)
    for k in range(2, 6):
        amplitude, phase = rng.uniform(0, 0.28 / (k - 0.5)), rng.uniform(0, 2 * np.pi)
        contour += radius * amplitude * np.cos(k * angle + phase)
    return _step(np.hypot(ys, xs) - contour, 1.5)


def _shaded(rng: Rng, normal_y: Array, normal_x: Array, light: tuple[float, float]) -> Array:
    """Shade a coloured surface of the given normals by diffuse and specular light."""
    normal_z = np.sqrt((1 - normal_y**2 - normal_x**2).clip(0, 1))
    lambert = (light[0] * normal_y + light[1] * normal_x) * 0.6 + 0.75 * normal_z
    shade = 0.28 + 0.75 * lambert.clip(0, 1)
    colour = rng.uniform(0.1, 0.95, 3).astype(np.float32)
    highlight = lambert.clip(0, 1) ** rng.uniform(12, 40) * rng.uniform(0, 0.7)
    return (shade[..., None] * colour + highlight[..., None]).clip(0, 1).astype(np.float32)


def _drawn(
    rng: Rng, kind: str, size: int, centre: tuple[float, float], radius: float, light_x: float
) -> tuple[Array, Array]:
    ys, xs = _grid(size, centre)
    light = (-0.7, light_x)
    if kind == "sphere":
        distance = np.hypot(ys, xs)
        return _shaded(rng, ys / radius, xs / radius, light), _step(distance - radius)
    if kind == "cone":
        half = ((ys + radius) / 2 * 0.8).clip(0.1, None)
        across = (xs / half).clip(-1, 1)
        alpha = _step(np.maximum(np.abs(xs) - half, np.abs(ys) - radius))
        return _shaded(rng, np.full_like(ys, -0.2), across * 0.9, light), alpha
    if kind == "capsule":
        tilt, length = rng.uniform(-1.2, 1.2), rng.uniform(0.8, 1.4) * radius
        thick = rng.uniform(0.35, 0.6) * radius
        along = xs * np.sin(tilt) + ys * np.cos(tilt)
        off_y = ys - along.clip(-length, length) * np.cos(tilt)
        off_x = xs - along.clip(-length, length) * np.sin(tilt)
        return _shaded(rng, off_y / thick, off_x / thick, light), _step(
            np.hypot(off_y, off_x) - thick
        )
    wide, high, lid = radius * rng.uniform(0.6, 1.1), radius * rng.uniform(0.6, 1.0), radius * 0.3
    front = _step(np.maximum(np.abs(xs) - wide, np.abs(ys) - high))
    top = _step(
        np.maximum(np.abs(xs + (ys + high) * 0.8) - wide, np.abs(ys + high + lid / 2) - lid / 2)
    )
    colour = rng.uniform(0.15, 0.9, 3).astype(np.float32)
    shade = (0.75 - 0.2 * ys / high).clip(0, 1)[..., None]
    rgb = np.where((top > front)[..., None], (colour * 1.25).clip(0, 1), colour * shade)
    return rgb.astype(np.float32), np.maximum(front, top)


def draw_object(
    rng: Rng, kind: str, size: int, centre: tuple[float, float], radius: float, light_x: float
) -> tuple[Array, Array]:
    """Draw an object, or cut one from a training photograph.

    Args:
        kind: one of `OBJECT_KINDS`.
        centre: row and column, in pixels.
        radius: half of the object's rough extent, in pixels.
        light_x: where the light comes from, -1 = left, 1 = right.

    Returns:
        Colours `(size, size, 3)` and matte `(size, size)`.
    """
    if kind not in OBJECT_KINDS:
        raise ValueError(f"Expected `kind` to be one of {OBJECT_KINDS}, but got {kind!r}.")
    if kind not in ("cutout", "coin"):
        return _drawn(rng, kind, size, centre, radius, light_x)
    reach = 1.5 * radius
    if kind == "coin":
        boxes = coin_boxes()
        piece = load_photograph("coins")[boxes[int(rng.integers(len(boxes)))]]
        piece, reach = jitter_colours(rng, piece), radius
        alpha = _step(np.hypot(*_grid(size, centre)) - 0.94 * radius)
    else:
        name = CUTOUT_PHOTOGRAPHS[int(rng.integers(len(CUTOUT_PHOTOGRAPHS)))]
        piece = jitter_colours(rng, random_crop(rng, load_photograph(name), 96, min_std=0.1))
        alpha = blob(rng, size, centre, radius)
    side = 2 * int(np.ceil(reach)) + 1
    ys, xs = _grid(size, centre)
    rows = (ys + side / 2).clip(0, side - 1).astype(np.intp)
    columns = (xs + side / 2).clip(0, side - 1).astype(np.intp)
    rgb = resize(piece, side, side)[rows, columns]
    shade = (1.0 + 0.25 * (light_x * xs - ys) / radius).clip(0.55, 1.3)
    return (rgb * shade[..., None]).clip(0, 1).astype(np.float32), alpha


def cast_shadow(
    rng: Rng, alpha: Array, centre: tuple[float, float], radius: float, light_x: float
) -> Array:
    """Return the shadow that an object throws away from the light, in [0, 1].

    A cast part (the matte sheared and squashed about its foot, softer with distance) and a
    contact part (a flat, dark ellipse at the foot).
    """
    rows = np.flatnonzero(alpha.max(1) > 0.5)
    foot = float(rows[-1]) if len(rows) else centre[0]
    shear = -np.sign(light_x) * rng.uniform(1.3, 2.4)
    squash = rng.uniform(0.45, 0.8)
    ys, xs = np.mgrid[0 : alpha.shape[0], 0 : alpha.shape[1]].astype(np.float32)
    height = (foot - ys) / squash
    source = np.stack([foot - height, xs - shear * height * squash])
    cast = ndimage.map_coordinates(alpha, source, order=1, mode="constant")
    near = ndimage.gaussian_filter(cast, rng.uniform(0.8, 1.5))
    far = ndimage.gaussian_filter(cast, rng.uniform(2.0, 3.5))
    distance = (height / (2 * radius)).clip(0, 1)
    soft = near * (1 - distance) + far * distance
    low = alpha[max(0, int(foot - radius * 0.4)) :].max(0)
    middle = float((low * np.arange(len(low))).sum() / max(float(low.sum()), 1e-6))
    flat = np.hypot((ys - foot) / (0.22 * radius), (xs - middle) / (0.85 * radius))
    contact = ndimage.gaussian_filter(_step(flat - 1, 0.5), 1.5)
    return np.maximum(soft, contact).clip(0, 1).astype(np.float32)


def random_mask(rng: Rng, size: int, kind: str, *, largest: float = 0.45) -> Array:
    """Draw a free mask of a kind, anywhere, from small to `largest` (side over image side)."""
    extent = size * rng.uniform(0.1, largest)
    centre = (float(rng.uniform(0, size)), float(rng.uniform(0, size)))
    if kind == "box":
        ys, xs = _grid(size, centre)
        half_y, half_x = extent * rng.uniform(0.4, 1.0, 2)
        return ((np.abs(ys) <= half_y) & (np.abs(xs) <= half_x)).astype(np.float32)
    if kind == "blob":
        return (blob(rng, size, centre, 0.7 * extent) > 0.5).astype(np.float32)
    return _stroke(rng, size, np.array(centre), extent)


def _stroke(rng: Rng, size: int, centre: NDArray[np.float64], extent: float) -> Array:
    """Brush a polyline of round strokes around `centre`."""
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    brush = size * rng.uniform(0.03, 0.09)
    points = centre + rng.uniform(-1, 1, (int(rng.integers(3, 6)), 2)) * extent
    mask = np.zeros((size, size), dtype=bool)
    for (y0, x0), (y1, x1) in pairwise(points):
        dy, dx = y1 - y0, x1 - x0
        t = (((ys - y0) * dy + (xs - x0) * dx) / max(dy * dy + dx * dx, 1e-6)).clip(0, 1)
        mask |= np.hypot(ys - y0 - t * dy, xs - x0 - t * dx) <= brush
    return mask.astype(np.float32)


def cover(rng: Rng, alpha: Array, kind: str) -> Array:
    """Draw a mask of a kind that covers every pixel of an object, and little of its shadow."""
    if kind not in MASK_KINDS:
        raise ValueError(f"Expected `kind` to be one of {MASK_KINDS}, but got {kind!r}.")
    size = alpha.shape[0]
    inside = alpha > 0.02
    margin = int(rng.integers(1, 4))
    tight = ndimage.binary_dilation(inside, iterations=margin)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if kind == "box":
        mask = np.zeros_like(inside)
        mask[
            max(0, rows[0] - margin) : rows[-1] + margin + 1,
            max(0, columns[0] - margin) : columns[-1] + margin + 1,
        ] = True
    elif kind == "blob":
        wobble = ndimage.gaussian_filter(tight.astype(np.float32), 2.5)
        mask = tight | (wobble > (0.3 + 0.12 * smooth_noise(rng, size, 5)).clip(0.05, None))
    else:
        middle = np.array([rows.mean(), columns.mean()])
        extent = 0.35 * max(rows[-1] - rows[0], columns[-1] - columns[0])
        mask = ndimage.binary_dilation(inside) | (_stroke(rng, size, middle, extent) > 0)
    return mask.astype(np.float32)


def compose(
    rng: Rng,
    background: Array,
    ref: Array,
    *,
    photograph: str = "",
    mask_kind: str | None = None,
    object_kind: str | None = None,
) -> Scene:
    """Put an object with its shadow on a background, and mask the object but not the shadow.

        shadowed = background · (1 - shadow · (1 - strength)),  strength in [0.35, 0.65]
        src = alpha · object + (1 - alpha) · shadowed,  result = background

    Scenes are drawn again until at least 60 % of the shadow that can be seen lies outside the mask
    and darkens it clearly; the best of 12 draws is returned.

    Args:
        background: `(S, S, 3)`, in [0, 1].
        ref: `(S, S, 3)`, in [0, 1]; a picture to condition on, handed through.
        mask_kind, object_kind: one of `MASK_KINDS`, `OBJECT_KINDS`; drawn when None.
    """
    size = background.shape[0]
    best, best_score = None, -np.inf
    for _draw in range(12):
        kind = mask_kind or MASK_KINDS[int(rng.integers(3))]
        thing = object_kind or str(rng.choice(OBJECT_KINDS, p=(0.4, 0.12, 0.14, 0.14, 0.1, 0.1)))
        radius = size * float(np.exp(rng.uniform(np.log(0.07), np.log(0.2))))
        edge = 1.3 * radius
        row = float(rng.uniform(min(edge, size / 2), max(size - edge, size / 2)))
        column = float(rng.uniform(edge, size - edge))
        towards_middle = -1.0 if column < size / 2 else 1.0
        light_x = towards_middle * float(rng.uniform(0.4, 0.8))
        rgb, alpha = draw_object(rng, thing, size, (row, column), radius, light_x)
        shadow = cast_shadow(rng, alpha, (row, column), radius, light_x)
        darkening = np.float32(1 - rng.uniform(0.35, 0.65))
        shadowed = background * (1 - shadow * darkening)[..., None]
        src = alpha[..., None] * rgb + (1 - alpha[..., None]) * shadowed
        mask = cover(rng, alpha, kind)
        visible = shadow * (1 - alpha)
        outside = float((visible * (1 - mask)).sum()) / max(float(visible.sum()), 1e-6)
        change = (background - src).mean(2) * (mask == 0)
        plain = float((change > 0.08).sum()) / (radius * radius)
        score = min(outside - 0.6, plain - 1.0)
        if score > best_score:
            best_score = score
            best = Scene(
                src.astype(np.float32),
                mask,
                background,
                ref,
                shadowed.astype(np.float32),
                shadow,
                alpha,
                kind,
                thing,
                photograph,
            )
        if score >= 0:
            break
    assert best is not None
    return best


def random_scene(rng: Rng, split: str, size: int = 128, *, mask_kind: str | None = None) -> Scene:
    """Compose a scene on a random crop of a random photograph of a split.

    >>> scene = random_scene(np.random.default_rng(0), "test", 64)
    >>> scene.src.shape, scene.mask.shape
    ((64, 64, 3), (64, 64))
    """
    names = photographs(split)
    weights = np.array([TRAIN_WEIGHTS.get(name, 1.0) for name in names])
    name = str(rng.choice(names, p=weights / weights.sum()))
    photograph = load_photograph(name)
    crops = [random_crop(rng, photograph, size, min_std=0.03, min_mean=0.3) for _ in range(2)]
    if split == "train":
        seed = int(rng.integers(2**31))
        crops = [jitter_colours(np.random.default_rng(seed), crop) for crop in crops]
    return compose(rng, crops[0], crops[1], photograph=name, mask_kind=mask_kind)
