"""Draw what objects do to a scene, and marks that only look like it: light, mirrors, text, stains.

Colors are `(S, S, 3)` and maps `(S, S)`, float32 in [0, 1].
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from objects import blob, grid, inside
from photographs import Array, Rng
from scenes import smooth_noise

LAMPS = ("globe", "shade", "candle")
"""The kinds of lamps."""

FLAME = np.array([1, 0.74, 0.42], np.float32)
"""The color of a candle's light."""

FONTS = ("DejaVuSans-Bold", "DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
WORDS = ("SAMPLE", "PREVIEW", "DRAFT", "PROOF", "Copyright", "Studio", "Archive", "Photo")


def lamp_color(rng: Rng) -> Array:
    """Draw the color of a light, from amber to cool white; the largest channel is 1."""
    colors = np.array([[1, 0.72, 0.42], [1, 0.84, 0.6], [1, 0.95, 0.85], [0.82, 0.92, 1]])
    color = colors[int(rng.integers(len(colors)))] * rng.uniform(0.94, 1.0, 3)
    return (color / color.max()).astype(np.float32)


def draw_lamp(
    rng: Rng, kind: str, size: int, foot: tuple[float, float], height: float, color: Array
) -> tuple[Array, Array, tuple[float, float]]:
    """Draw a lamp that is on.

    Args:
        kind: one of `LAMPS`.
        size: side of the square.
        foot: row and column of the middle of its lower edge.
        height: in pixels.
        color: `(3,)`, of its light.

    Returns:
        Colors, matte, and row and column of its light.
    """
    ys, xs = grid(size, foot)
    dark = np.float32(rng.uniform(0.06, 0.25)) * rng.uniform(0.7, 1.0, 3).astype(np.float32)
    if kind == "globe":
        radius = 0.38 * height
        ball = np.hypot(ys + 0.62 * height, xs) - radius
        half = height * 0.26 + 0.35 * ys.clip(-0.3 * height, 0)
        base = np.maximum(np.abs(xs) - half, np.abs(ys + 0.14 * height) - 0.14 * height)
        bright, solid, middle = inside(ball), inside(base), -0.62 * height
        glow = 1 - 0.3 * (np.hypot(ys + 0.62 * height, xs) / radius).clip(0, 1) ** 2
    elif kind == "shade":
        top, low = -height, -0.52 * height
        half = height * (0.2 + 0.2 * ((ys - top) / (low - top)).clip(0, 1))
        cover = np.maximum(np.abs(xs) - half, np.abs(ys - (top + low) / 2) - (low - top) / 2)
        stand = np.maximum(
            np.abs(xs) - 0.035 * height - 0.5, np.abs(ys + 0.3 * height) - 0.3 * height
        )
        plate = np.hypot((ys + 0.05 * height) / 0.35, xs) - 0.2 * height
        bright, solid, middle = inside(cover), inside(np.minimum(stand, plate)), (top + low) / 2
        glow = 1 - 0.35 * (np.abs(xs) / (0.4 * height)).clip(0, 1) - 0.2 * (low - ys) / (low - top)
    else:
        column = np.maximum(np.abs(xs) - 0.13 * height, np.abs(ys + 0.36 * height) - 0.36 * height)
        flame = np.hypot((ys + 0.84 * height) / 1.9, xs) - 0.075 * height
        bright, solid, middle = inside(flame), inside(column), -0.84 * height
        dark = np.float32(0.85) * np.array([1, 0.95, 0.88], np.float32)
        glow = np.ones_like(ys)
    # What carries the light is lit by it from above.
    shine = np.exp(-np.abs(ys - middle) / (0.35 * height))[..., None] * color
    body = dark * (0.8 + 0.7 * shine) + 0.12 * shine
    lit = (0.35 + 0.65 * color) * glow.clip(0, 1)[..., None]
    rgb = bright[..., None] * lit + (1 - bright[..., None]) * body
    alpha = np.maximum(bright, solid)
    return rgb.clip(0, 1).astype(np.float32), alpha, (foot[0] + middle, foot[1])


def light_field(size: int, center: tuple[float, float], reach: float) -> Array:
    """Return the light of a lamp on its surroundings: (1 + (d / reach)²)^(-3/2), 1 at its center.

    It is that of a point at the distance `reach` in front of a wall, which is lit by the cosine of
    the angle over the square of the distance.
    """
    ys, xs = grid(size, center)
    field: Array = (1 + (ys**2 + xs**2) / reach**2) ** -1.5
    return field.astype(np.float32)


def reflect(rng: Rng, rgb: Array, alpha: Array, foot: int) -> tuple[Array, Array]:
    """Return the reflection of an object in a smooth floor below its foot: colors and strength."""
    rows = 2 * foot - 1 - np.arange(alpha.shape[0])
    seen = (rows >= 0) & (rows < foot)
    rows = rows.clip(0, alpha.shape[0] - 1)
    extent = max(1, foot - int(np.flatnonzero(alpha.max(1) > 0.5)[0]))
    fade = (1 - (foot - rows) / (rng.uniform(0.5, 1) * extent)).clip(0, 1) * seen
    strength = rng.uniform(0.15, 0.4) * alpha[rows] * fade[:, None]
    blur = alpha.shape[0] / 128 * rng.uniform(0.3, 1)
    blurred = ndimage.gaussian_filter(strength, blur)
    blurred[:foot] = 0
    return rgb[rows], blurred.astype(np.float32)


def mirror(image: Array, row: int, waves: Array) -> Array:
    """Turn an image over at a row, as still water does.

    Args:
        image: `(S, S, C)`.
        row: the line at which it is turned over.
        waves: `(S, S)`, by how many pixels the image is seen to the right.

    Returns:
        `(S, S, C)`; above the row it has no meaning.
    """
    ys, xs = np.mgrid[: image.shape[0], : image.shape[1]].astype(np.float32)
    places = np.stack([2 * row - 1 - ys, xs + waves])
    channels = [
        ndimage.map_coordinates(image[..., c], places, order=1, mode="nearest")
        for c in range(image.shape[2])
    ]
    return np.stack(channels, -1).astype(np.float32)


@lru_cache(maxsize=64)
def load_font(name: str, pixels: int) -> ImageFont.FreeTypeFont:
    """Load one of `FONTS`, which matplotlib brings."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), pixels)


def draw_text(rng: Rng, size: int, text: str) -> Array:
    """Draw a line of text, level or tilted, somewhere in a square; return its matte."""
    scale = 4
    name = str(rng.choice(FONTS))
    width = size * float(rng.uniform(0.4, 0.8))
    font = load_font(name, 100)
    pixels = max(8, round(100 * scale * width / font.getlength(text)))
    pixels = min(pixels, round(0.22 * size * scale))
    font = load_font(name, pixels)
    left, top, right, bottom = font.getbbox(text)
    angle = float(rng.choice((0.0, 0.0, rng.uniform(-35, 35))))
    reach = np.deg2rad(abs(angle))
    half_x = ((right - left) * np.cos(reach) + (bottom - top) * np.sin(reach)) / 2
    half_y = ((right - left) * np.sin(reach) + (bottom - top) * np.cos(reach)) / 2
    side, edge = size * scale, 0.08 * size * scale
    center = [
        float(rng.uniform(min(half + edge, side / 2), max(side - half - edge, side / 2)))
        for half in (half_x, half_y)
    ]
    canvas = Image.new("L", (side, side))
    place = (side / 2 - (left + right) / 2, side / 2 - (top + bottom) / 2)
    ImageDraw.Draw(canvas).text(place, text, fill=255, font=font)
    canvas = canvas.rotate(angle, Image.Resampling.BICUBIC)
    canvas = canvas.transform(
        (side, side),
        Image.Transform.AFFINE,
        (1, 0, side / 2 - center[0], 0, 1, side / 2 - center[1]),
        Image.Resampling.BILINEAR,
    )
    small = canvas.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def draw_plate(alpha: Array, margin: float, corner: float) -> Array:
    """Return the matte of a plate with round corners behind a line of text, turned as the text.

    Args:
        alpha: of the text.
        margin: of the plate around the text, in pixels.
        corner: radius of its corners, in pixels.
    """
    points = np.argwhere(alpha > 0.1).astype(np.float64)
    middle = points.mean(0)
    _, _, axes = np.linalg.svd(points - middle, full_matrices=False)
    along = (points - middle) @ axes.T
    low, high = along.min(0), along.max(0)
    half = (high - low) / 2 + margin - corner
    ys, xs = np.mgrid[: alpha.shape[0], : alpha.shape[1]].astype(np.float64)
    places = np.stack([ys - middle[0], xs - middle[1]], -1) @ axes.T - (low + high) / 2
    beyond = np.abs(places) - half
    outside = np.hypot(*np.moveaxis(beyond.clip(0, None), -1, 0)) + beyond.max(-1).clip(None, 0)
    return inside((outside - corner).astype(np.float32))


def draw_stain(rng: Rng, size: int, center: tuple[float, float], radius: float) -> Array:
    """Draw a spill on the ground, seen at a slant: a flat blob with a dark rim, and drops."""
    flat = float(rng.uniform(0.35, 0.55))
    middle = (size - 1) / 2
    pool = blob(rng, size, (middle, middle), radius)
    for _ in range(int(rng.integers(1, 5))):
        angle, reach = rng.uniform(0, 2 * np.pi), radius * rng.uniform(1.05, 1.6)
        drop = (middle + reach * np.sin(angle), middle + reach * np.cos(angle))
        pool = np.maximum(pool, blob(rng, size, drop, radius * float(rng.uniform(0.06, 0.2))))
    ys, xs = grid(size, center)
    places = np.stack([middle + ys / flat, middle + xs])
    pool = ndimage.map_coordinates(pool, places, order=1, mode="constant")
    depth = ndimage.distance_transform_edt(pool > 0.5)
    rim = np.exp(-depth / max(0.02 * size, 1.0)) * (pool > 0.1)
    uneven = 0.8 + 0.07 * smooth_noise(rng, size, 0.03 * size) + 0.2 * rim
    return (pool * uneven).clip(0, 1).astype(np.float32)
