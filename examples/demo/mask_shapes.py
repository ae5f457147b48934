"""Masks as people draw them around an object: Bézier curves, boxes, dilations."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from photographs import Array, Rng
from scenes import cover

OWN_MASK_KINDS = ("bezier", "box", "dilated")


def closed_bezier(points: Array, steps: int = 12) -> Array:
    """Return points on a smooth closed curve through `points`, of cubic Bézier segments.

    A segment from p1 to p2 has the control points p1 + (p2 - p0) / 6 and p2 - (p3 - p1) / 6.

    Args:
        points: `(N, 2)`.
        steps: points per segment.

    Returns:
        `(N * steps, 2)`; every `steps`-th one is one of `points`.
    """
    before, after, second = (np.roll(points, shift, 0) for shift in (1, -1, -2))
    first_control, second_control = points + (after - before) / 6, after - (second - points) / 6
    t = np.linspace(0, 1, steps, endpoint=False)[None, :, None]
    parts = [
        (1 - t) ** 3 * points[:, None],
        3 * t * (1 - t) ** 2 * first_control[:, None],
        3 * t**2 * (1 - t) * second_control[:, None],
        t**3 * after[:, None],
    ]
    curve: Array = sum(parts[1:], parts[0]).reshape(-1, 2)
    return curve


def draw_bezier(rng: Rng, inside: Array) -> Array:
    """Draw a free curve around an object: through points 5 to 35 % outside of its outline."""
    rows, columns = np.nonzero(inside)
    middle = np.array([rows.mean(), columns.mean()])
    offsets = np.stack([rows, columns], 1) - middle
    angles, radii = np.arctan2(offsets[:, 0], offsets[:, 1]), np.hypot(*offsets.T)
    count = int(rng.integers(6, 12))
    ends = np.linspace(-np.pi, np.pi, count, endpoint=False) + rng.uniform(0, 2 * np.pi / count)
    distances = np.abs((angles[None] - ends[:, None] + np.pi) % (2 * np.pi) - np.pi)
    near = distances < np.pi / count
    reach = np.where(near, radii[None], 0).max(1)
    reach = np.maximum(reach, 0.3 * radii.max()) * rng.uniform(1.05, 1.35, count)
    points = middle + reach[:, None] * np.stack([np.sin(ends), np.cos(ends)], 1)
    canvas = Image.new("1", inside.shape[::-1])
    curve = closed_bezier(points)
    ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for y, x in curve], fill=1)
    return np.asarray(canvas)


def cover_as(rng: Rng, alpha: Array, kind: str) -> Array:
    """Draw a mask that covers every pixel of an object.

    Args:
        alpha: `(S, S)`, in [0, 1].
        kind: `bezier`, a curve around the object; `dilated`, the object grown by 2 to 15 % of its
            extent; or one of `scenes.MASK_KINDS`.
    """
    inside = alpha > 0.02
    if kind == "bezier":
        return (draw_bezier(rng, inside) | inside).astype(np.float32)
    if kind == "dilated":
        extent = max(np.ptp(np.flatnonzero(inside.any(axis))) for axis in (0, 1))
        distance = ndimage.distance_transform_edt(~inside)
        return (distance <= max(1, extent * rng.uniform(0.02, 0.15))).astype(np.float32)
    return cover(rng, alpha, kind)
