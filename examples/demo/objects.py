"""Draw objects, or cut them from training photographs, and the shadows that they cast.

Colors are `(S, S, 3)` and mattes `(S, S)`, float32 in [0, 1].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from photographs import Array, Rng, coin_boxes, jitter_colors, load_photograph, random_crop, resize

CUTOUT_PHOTOGRAPHS = ("astronaut", "motorcycle", "flower", "ihc", "retina", "rocket")
OBJECT_KINDS = ("cutout", "coin", "sphere", "box", "capsule", "cone")


def grid(size: int, center: tuple[float, float]) -> tuple[Array, Array]:
    """Return the rows and columns of a square, counted from `center`."""
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    return ys - center[0], xs - center[1]


def inside(distance: NDArray[np.floating[Any]], softness: float = 1.0) -> Array:
    """Return an antialiased inside: 1 where `distance` (pixels) is negative, 0 where positive."""
    return (0.5 - distance / softness).clip(0, 1).astype(np.float32)


def blob(rng: Rng, size: int, center: tuple[float, float], radius: float) -> Array:
    """Return the matte of a smooth, star-shaped blob of mean `radius` pixels."""
    ys, xs = grid(size, center)
    angle = np.arctan2(ys, xs)
    contour = np.full_like(angle, radius)
    for k in range(2, 6):
        amplitude, phase = rng.uniform(0, 0.28 / (k - 0.5)), rng.uniform(0, 2 * np.pi)
        contour += radius * amplitude * np.cos(k * angle + phase)
    return inside(np.hypot(ys, xs) - contour, 1.5)


def _shaded(rng: Rng, normal_y: Array, normal_x: Array, light: tuple[float, float]) -> Array:
    """Shade a colored surface of the given normals by diffuse and specular light."""
    normal_z = np.sqrt((1 - normal_y**2 - normal_x**2).clip(0, 1))
    lambert = (light[0] * normal_y + light[1] * normal_x) * 0.6 + 0.75 * normal_z
    shade = 0.28 + 0.75 * lambert.clip(0, 1)
    color = rng.uniform(0.1, 0.95, 3).astype(np.float32)
    highlight = lambert.clip(0, 1) ** rng.uniform(12, 40) * rng.uniform(0, 0.7)
    return (shade[..., None] * color + highlight[..., None]).clip(0, 1).astype(np.float32)


def _drawn(
    rng: Rng, kind: str, size: int, center: tuple[float, float], radius: float, light_x: float
) -> tuple[Array, Array]:
    ys, xs = grid(size, center)
    light = (-0.7, light_x)
    if kind == "sphere":
        distance = np.hypot(ys, xs)
        return _shaded(rng, ys / radius, xs / radius, light), inside(distance - radius)
    if kind == "cone":
        half = ((ys + radius) / 2 * 0.8).clip(0.1, None)
        across = (xs / half).clip(-1, 1)
        alpha = inside(np.maximum(np.abs(xs) - half, np.abs(ys) - radius))
        return _shaded(rng, np.full_like(ys, -0.2), across * 0.9, light), alpha
    if kind == "capsule":
        tilt, length = rng.uniform(-1.2, 1.2), rng.uniform(0.8, 1.4) * radius
        thick = rng.uniform(0.35, 0.6) * radius
        along = xs * np.sin(tilt) + ys * np.cos(tilt)
        off_y = ys - along.clip(-length, length) * np.cos(tilt)
        off_x = xs - along.clip(-length, length) * np.sin(tilt)
        return _shaded(rng, off_y / thick, off_x / thick, light), inside(
            np.hypot(off_y, off_x) - thick
        )
    wide, high, lid = radius * rng.uniform(0.6, 1.1), radius * rng.uniform(0.6, 1.0), radius * 0.3
    front = inside(np.maximum(np.abs(xs) - wide, np.abs(ys) - high))
    top = inside(
        np.maximum(np.abs(xs + (ys + high) * 0.8) - wide, np.abs(ys + high + lid / 2) - lid / 2)
    )
    color = rng.uniform(0.15, 0.9, 3).astype(np.float32)
    shade = (0.75 - 0.2 * ys / high).clip(0, 1)[..., None]
    rgb = np.where((top > front)[..., None], (color * 1.25).clip(0, 1), color * shade)
    return rgb.astype(np.float32), np.maximum(front, top)


def draw_object(
    rng: Rng, kind: str, size: int, center: tuple[float, float], radius: float, light_x: float
) -> tuple[Array, Array]:
    """Draw an object, or cut one from a training photograph.

    Args:
        kind: one of `OBJECT_KINDS`.
        center: row and column, in pixels.
        radius: half of the object's rough extent, in pixels.
        light_x: where the light comes from, -1 = left, 1 = right.

    Returns:
        Colors `(size, size, 3)` and matte `(size, size)`.
    """
    if kind not in OBJECT_KINDS:
        raise ValueError(f"Expected `kind` to be one of {OBJECT_KINDS}, but got {kind!r}.")
    if kind not in ("cutout", "coin"):
        return _drawn(rng, kind, size, center, radius, light_x)
    reach = 1.5 * radius
    if kind == "coin":
        boxes = coin_boxes()
        piece = load_photograph("coins")[boxes[int(rng.integers(len(boxes)))]]
        piece, reach = jitter_colors(rng, piece), radius
        alpha = inside(np.hypot(*grid(size, center)) - 0.94 * radius)
    else:
        name = CUTOUT_PHOTOGRAPHS[int(rng.integers(len(CUTOUT_PHOTOGRAPHS)))]
        piece = jitter_colors(rng, random_crop(rng, load_photograph(name), 96, min_std=0.1))
        alpha = blob(rng, size, center, radius)
    side = 2 * int(np.ceil(reach)) + 1
    ys, xs = grid(size, center)
    rows = (ys + side / 2).clip(0, side - 1).astype(np.intp)
    columns = (xs + side / 2).clip(0, side - 1).astype(np.intp)
    rgb = resize(piece, side, side)[rows, columns]
    shade = (1.0 + 0.25 * (light_x * xs - ys) / radius).clip(0.55, 1.3)
    return (rgb * shade[..., None]).clip(0, 1).astype(np.float32), alpha


def cast_shadow(
    rng: Rng,
    alpha: Array,
    center: tuple[float, float],
    radius: float,
    light_x: float,
    *,
    blur: float = 1.0,
) -> Array:
    """Return the shadow that an object throws away from the light, in [0, 1].

    A cast part (the matte sheared and squashed about its foot, softer with distance) and a
    contact part (a flat, dark ellipse at the foot). `blur` multiplies the softness, 1 for an image
    of 128 pixels.
    """
    rows = np.flatnonzero(alpha.max(1) > 0.5)
    foot = float(rows[-1]) if len(rows) else center[0]
    shear = -np.sign(light_x) * rng.uniform(1.3, 2.4)
    squash = rng.uniform(0.45, 0.8)
    ys, xs = np.mgrid[0 : alpha.shape[0], 0 : alpha.shape[1]].astype(np.float32)
    height = (foot - ys) / squash
    source = np.stack([foot - height, xs - shear * height * squash])
    cast = ndimage.map_coordinates(alpha, source, order=1, mode="constant")
    near = ndimage.gaussian_filter(cast, blur * rng.uniform(0.8, 1.5))
    far = ndimage.gaussian_filter(cast, blur * rng.uniform(2.0, 3.5))
    distance = (height / (2 * radius)).clip(0, 1)
    soft = near * (1 - distance) + far * distance
    low = alpha[max(0, int(foot - radius * 0.4)) :].max(0)
    middle = float((low * np.arange(len(low))).sum() / max(float(low.sum()), 1e-6))
    flat = np.hypot((ys - foot) / (0.22 * radius), (xs - middle) / (0.85 * radius))
    contact = ndimage.gaussian_filter(inside(flat - 1, 0.5), 1.5 * blur)
    return np.maximum(soft, contact).clip(0, 1).astype(np.float32)
