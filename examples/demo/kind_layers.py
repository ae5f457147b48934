"""The layers of a scene by kind of removal: an object, its effects, and the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from effects import (
    FLAME,
    LAMPS,
    WORDS,
    draw_lamp,
    draw_plate,
    draw_stain,
    draw_text,
    lamp_color,
    light_field,
    mirror,
)
from objects import OBJECT_KINDS, cast_shadow, draw_object, grid, inside
from photographs import Array, Rng


class Thing(NamedTuple):
    """An object in a scene.

    Attributes:
        rgb: `(S, S, 3)`.
        alpha: `(S, S)`.
        middle: row and column, in pixels.
        radius: half of its extent.
        light_x: where the light comes from, -1 = left, 1 = right.
        name: its kind or file.
    """

    rgb: Array
    alpha: Array
    middle: tuple[float, float]
    radius: float
    light_x: float
    name: str

    @property
    def foot(self) -> int:
        """Return the row below its lowest one."""
        return int(np.flatnonzero(self.alpha.max(1) > 0.5)[-1]) + 1


class Layers(NamedTuple):
    """A scene without its mask: `src = alpha · rgb + (1 - alpha) · behind`.

    Attributes:
        thing: what is removed.
        behind: `(S, S, 3)`, what is seen without it, with its effects.
        result: `(S, S, 3)`, what is seen without its effects, too.
        effect: `(S, S)`, where the effects are.
        mark: `(S, S)`, where a mark stays.
    """

    thing: Thing
    behind: Array
    result: Array
    effect: Array
    mark: Array


Draw = Callable[[Rng, Array], Thing]
"""Draws an object for a background."""


def draw_thing(rng: Rng, background: Array) -> Thing:
    """Draw one of the demonstration's objects anywhere on a background."""
    size = background.shape[0]
    kind = str(rng.choice(OBJECT_KINDS, p=(0.3, 0.1, 0.15, 0.15, 0.15, 0.15)))
    radius = size * float(np.exp(rng.uniform(np.log(0.08), np.log(0.18))))
    row = float(rng.uniform(max(1.5 * radius, 0.35 * size), size - 1.6 * radius))
    column = float(rng.uniform(1.5 * radius, size - 1.5 * radius))
    light_x = (-1.0 if column < size / 2 else 1.0) * float(rng.uniform(0.4, 0.8))
    rgb, alpha = draw_object(rng, kind, size, (row, column), radius, light_x)
    return Thing(rgb, alpha, (row, column), radius, light_x, kind)


def with_shadow(rng: Rng, background: Array, draw: Draw) -> Layers:
    """Let an object throw a shadow: behind = background · (1 - s · shadow), s in [0.35, 0.65]."""
    thing = draw(rng, background)
    blur = background.shape[0] / 128
    shadow = cast_shadow(rng, thing.alpha, thing.middle, thing.radius, thing.light_x, blur=blur)
    strength = np.float32(rng.uniform(0.35, 0.65))
    behind = background * (1 - strength * shadow)[..., None]
    return Layers(thing, behind, background, shadow, np.zeros_like(shadow))


def with_glow(rng: Rng, background: Array, draw: Draw) -> Layers:
    """Light a dim scene with a lamp.

        result = a · background,                      a in [0.35, 0.6]
        lit = result · (1 + g · light · color)        g in [1.4, 3]
        behind = 1 - (1 - lit) · (1 - bloom · color)

    Pixels above 1 are clipped. The lamp takes the place of the object of `draw`.
    """
    size = background.shape[0]
    ambient = np.float32(rng.uniform(0.35, 0.6))
    tint = np.array([0.94, 0.97, 1.0], np.float32)
    result = (background * ambient * tint).astype(np.float32)
    color, kind = lamp_color(rng), str(rng.choice(LAMPS))
    color = FLAME if kind == "candle" else color
    height = size * float(rng.uniform(0.18, 0.36))
    foot = (
        float(rng.uniform(max(0.5 * size, height + 4), 0.92 * size)),
        float(rng.uniform(0.2 * size, 0.8 * size)),
    )
    rgb, alpha, center = draw_lamp(rng, kind, size, foot, height, color)
    light = light_field(size, center, size * float(rng.uniform(0.1, 0.24)))
    gain = np.float32(rng.uniform(1.4, 3.0))
    lit = (result * (1 + gain * light[..., None] * color)).clip(0, 1)
    distance = np.hypot(*grid(size, center))
    bloom = np.float32(rng.uniform(0.25, 0.5)) * np.exp(-((distance / (0.45 * height)) ** 2))
    behind = 1 - (1 - lit) * (1 - bloom[..., None] * color)
    thing = Thing(rgb, alpha, center, height / 2, 0.0, kind)
    return Layers(thing, behind.astype(np.float32), result, light, np.zeros_like(light))


def with_reflection(rng: Rng, background: Array, draw: Draw) -> Layers:
    """Put an object onto still water or a polished floor, which mirrors what stands above it.

        result = (1 - m) · background + m · mirrored background,   m in [0, 0.25] below the foot
        behind = (1 - k · matte) · result + k · mirrored object,   k in [0.4, 0.75] at the foot

    Ripples and the loss of strength grow with the distance from the foot.
    """
    size = background.shape[0]
    thing = draw(rng, background)
    foot, scale = thing.foot, size / 128
    below = (np.arange(size, dtype=np.float32) - foot + 0.5).clip(0, None)
    depth = below / max(size - foot, 1)
    amplitude, period = scale * float(rng.uniform(0, 1.2)), scale * float(rng.uniform(3, 7))
    ripples = amplitude * depth * np.sin(2 * np.pi * below / (period * (1 + depth)))
    waves = np.broadcast_to(ripples[:, None], (size, size)).astype(np.float32)
    blur = (scale * float(rng.uniform(0.3, 0.8)), 0.3 * scale, 0)

    polish = np.float32(rng.uniform(0, 0.25)) * (below / (0.15 * size)).clip(0, 1)
    above = ndimage.gaussian_filter(mirror(background, foot, waves), blur)
    result = background + polish[:, None, None] * (above - background)

    matte = thing.alpha[..., None]
    turned = mirror(np.dstack([thing.rgb * matte, matte]), foot, waves)
    turned = ndimage.gaussian_filter(turned, blur)
    fade = (1 - below / (float(rng.uniform(1.6, 3.0)) * 2 * thing.radius)).clip(0, 1)
    strength = np.float32(rng.uniform(0.4, 0.75)) * fade * (below > 0)
    turned = turned * strength[:, None, None]
    seen = turned[..., 3]
    behind = (1 - seen[..., None]) * result + turned[..., :3]
    return Layers(
        thing,
        behind.clip(0, 1).astype(np.float32),
        result.astype(np.float32),
        seen.astype(np.float32),
        np.zeros_like(seen),
    )


def with_text(rng: Rng, background: Array, draw: Draw) -> Layers:
    """Write a line of text over a scene, on a translucent plate or with a soft shadow.

    The text takes the place of the object of `draw`. It is translucent, too: its matte is at most
    0.7 to 1.
    """
    size = background.shape[0]
    word = str(rng.choice(WORDS))
    text = str(
        rng.choice((word, f"{word} {int(rng.integers(10, 100))}", f"\N{COPYRIGHT SIGN} {word}"))
    )
    matte = draw_text(rng, size, text)
    light = bool(rng.random() < 0.7)
    shades = rng.uniform(0.85, 1.0, 3) if light else rng.uniform(0.0, 0.2, 3)
    if rng.random() < 0.25:
        shades = rng.uniform(0, 1, 3)
    color = shades.astype(np.float32)
    if rng.random() < 0.6:
        plate = draw_plate(matte, size * float(rng.uniform(0.05, 0.08)), 0.03 * size)
        under = np.float32(0.05 if color.mean() > 0.5 else 0.95)
        effect = plate * np.float32(rng.uniform(0.3, 0.55))
    else:
        offset = size / 128 * rng.uniform(1.5, 3.0)
        shifted = ndimage.shift(matte, (offset, offset), order=1)
        soft = ndimage.gaussian_filter(
            np.maximum(shifted, matte), size / 128 * rng.uniform(1.0, 2.2)
        )
        under = np.float32(0.0 if color.mean() > 0.5 else 1.0)
        effect = (1.6 * soft).clip(0, 1) * np.float32(rng.uniform(0.45, 0.75))
    behind = background * (1 - effect[..., None]) + under * effect[..., None]
    alpha = matte * np.float32(rng.uniform(0.7, 1.0))
    rgb = np.broadcast_to(color, background.shape).copy()
    rows, columns = np.nonzero(matte > 0.1)
    thing = Thing(rgb, alpha, (rows.mean(), columns.mean()), np.ptp(columns) / 2, 0.0, text)
    return Layers(
        thing,
        behind.astype(np.float32),
        background,
        effect.astype(np.float32),
        np.zeros_like(matte),
    )


def with_stain(rng: Rng, background: Array, draw: Draw) -> Layers:
    """Put an object beside a spill that looks like its shadow; only its narrow contact shadow goes.

    result = background · (1 - s · (1 - color) · spill),   s in [0.5, 0.8]
    behind = result · (1 - 0.4 · contact)
    """
    thing = draw(rng, background)
    size = background.shape[0]
    side = -np.sign(thing.light_x) or 1.0
    radius = thing.radius * float(rng.uniform(0.8, 1.4))
    column = thing.middle[1] + side * thing.radius * float(rng.uniform(0.9, 1.5))
    row = thing.foot - 0.15 * thing.radius + radius * float(rng.uniform(-0.1, 0.2))
    spill = draw_stain(rng, size, (row, column), radius)
    colors = np.array([[0.1, 0.1, 0.12], [0.3, 0.2, 0.12], [0.2, 0.05, 0.05], [0.25, 0.25, 0.3]])
    color = colors[int(rng.integers(len(colors)))].astype(np.float32)
    strength = np.float32(rng.uniform(0.5, 0.8))
    result = background * (1 - strength * (1 - color) * spill[..., None])
    ys, xs = grid(size, (thing.foot, thing.middle[1]))
    flat = np.hypot(ys / (0.1 * thing.radius + 1), xs / (0.8 * thing.radius))
    contact = ndimage.gaussian_filter(inside(flat - 1, 0.5), size / 128)
    behind = result * (1 - np.float32(0.4) * contact)[..., None]
    return Layers(
        thing,
        behind.astype(np.float32),
        result.astype(np.float32),
        contact.astype(np.float32),
        spill,
    )


COMPOSERS: dict[str, Callable[[Rng, Array, Draw], Layers]] = {
    "shadow": with_shadow,
    "glow": with_glow,
    "reflection": with_reflection,
    "text": with_text,
    "stain": with_stain,
}
