"""Compose removal scenes from real photographs: an object with its shadow, a mask, a target.

Every function is pure: what is random comes from the `numpy.random.Generator` that it is given.
Images are `(S, S, 3)` and maps `(S, S)`, float32 in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from objects import OBJECT_KINDS, blob, cast_shadow, draw_object, grid
from photographs import (
    Array,
    Rng,
    jitter_colors,
    load_photograph,
    random_crop,
    random_photograph,
)

MASK_KINDS = ("blob", "stroke", "box")


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
    kind: str = "shadow"


def smooth_noise(rng: Rng, size: int, sigma: float) -> Array:
    """Return Gaussian noise of `(size, size)`, blurred by `sigma` pixels, of unit variance."""
    noise = ndimage.gaussian_filter(rng.standard_normal((size, size)), sigma, mode="wrap")
    return (noise / max(float(noise.std()), 1e-6)).astype(np.float32)


def random_mask(rng: Rng, size: int, kind: str, *, largest: float = 0.45) -> Array:
    """Draw a free mask of a kind, anywhere, from small to `largest` (side over image side)."""
    extent = size * rng.uniform(0.1, largest)
    center = (float(rng.uniform(0, size)), float(rng.uniform(0, size)))
    if kind == "box":
        ys, xs = grid(size, center)
        half_y, half_x = extent * rng.uniform(0.4, 1.0, 2)
        return ((np.abs(ys) <= half_y) & (np.abs(xs) <= half_x)).astype(np.float32)
    if kind == "blob":
        return (blob(rng, size, center, 0.7 * extent) > 0.5).astype(np.float32)
    return _stroke(rng, size, np.array(center), extent)


def _stroke(rng: Rng, size: int, center: NDArray[np.float64], extent: float) -> Array:
    """Brush a polyline of round strokes around `center`."""
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    brush = size * rng.uniform(0.03, 0.09)
    points = center + rng.uniform(-1, 1, (int(rng.integers(3, 6)), 2)) * extent
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
        ref: `(S, S, 3)`, in [0, 1]; an image to condition on, handed through.
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
    name = random_photograph(rng, split)
    photograph = load_photograph(name)
    crops = [random_crop(rng, photograph, size, min_std=0.03, min_mean=0.3) for _ in range(2)]
    if split == "train":
        seed = int(rng.integers(2**31))
        crops = [jitter_colors(np.random.default_rng(seed), crop) for crop in crops]
    return compose(rng, crops[0], crops[1], photograph=name, mask_kind=mask_kind)
