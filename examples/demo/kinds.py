"""Compose scenes of several kinds of removal, which differ in what has to go outside the mask.

| kind | the object | outside the mask |
|---|---|---|
| shadow | anything | its shadow goes |
| glow | a lamp that is on | its light goes |
| reflection | anything, on water or a polished floor | its mirror image goes |
| text | a line of text | its plate and its shadow go |
| stain | anything beside a spill on the ground | the spill stays |
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kind_layers import COMPOSERS, Draw, draw_thing
from photographs import Array, Rng, jitter_colors, load_photograph, random_crop, random_photograph
from scenes import Scene, cover, random_scene

KINDS = ("shadow", "glow", "reflection", "text", "stain")

DRAWS = 12
"""Scenes are drawn so many times at most, until their effect is neither hidden nor everywhere."""

VISIBLE = 0.05
"""Change of the mean of the channels that can be seen."""

LARGEST = 0.22
"""Share of the pixels that change visibly at most."""

LEAST = {"shadow": 0.01, "glow": 0.05, "reflection": 0.01, "text": 0.006, "stain": 0.008}
"""Share of the pixels outside the mask that change visibly at least, or carry a mark that stays."""

Cover = Callable[[Rng, Array], Array]
"""Draws a mask for the matte of an object."""


def compose_kind(
    rng: Rng,
    kind: str,
    background: Array,
    ref: Array,
    *,
    cover: Cover,
    draw: Draw = draw_thing,
    mask_kind: str = "",
    photograph: str = "",
) -> Scene:
    """Compose a scene of a kind, with a mask of the object that leaves its effects.

    Scenes are drawn again until the share of the pixels outside the mask with a visible effect, or
    with the mark that stays, is in [`LEAST`, `LARGEST`]; the best of `DRAWS` is returned.

    Args:
        kind: one of `KINDS`.
        background: `(S, S, 3)`, in [0, 1].
        ref: `(S, S, 3)`, in [0, 1]; handed through.
        cover: draws the mask of an object.
        draw: draws the object; lamps and texts take its place.
        mask_kind: what `cover` draws, for the record.
        photograph: where the background is from, for the record.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in COMPOSERS:
        raise ValueError(f"Expected `kind` to be one of {KINDS}, but got {kind!r}.")
    best, best_score = None, -np.inf
    for _draw in range(DRAWS):
        layers = COMPOSERS[kind](rng, background, draw)
        thing = layers.thing
        alpha = thing.alpha[..., None]
        src = (alpha * thing.rgb + (1 - alpha) * layers.behind).astype(np.float32)
        mask = cover(rng, thing.alpha)
        change = np.abs(src - layers.result).mean(2)
        if kind == "stain":  # it has to be as plain as a shadow would be
            change = np.abs(layers.result - background).mean(2) / 2
        share = float(((change > VISIBLE) & (mask == 0)).mean())
        score = min(share - LEAST[kind], LARGEST - share)
        if score > best_score:
            best_score = score
            best = Scene(
                src=src,
                mask=mask,
                result=layers.result,
                ref=ref,
                shadowed=layers.behind,
                shadow=layers.effect,
                alpha=thing.alpha,
                mask_kind=mask_kind,
                object_kind=thing.name,
                photograph=photograph,
                kind=kind,
            )
        if score >= 0:
            break
    assert best is not None
    return best


def random_kind_scene(
    rng: Rng, split: str, size: int = 128, *, kind: str, mask_kind: str = "blob"
) -> Scene:
    """Compose a scene of a kind on a random crop of a random photograph of a split.

    A shadow scene is that of `random_scene`.

    >>> scene = random_kind_scene(np.random.default_rng(0), "test", 64, kind="glow")
    >>> scene.kind, scene.src.shape
    ('glow', (64, 64, 3))
    """
    if kind == "shadow":
        return random_scene(rng, split, size, mask_kind=mask_kind)
    name = random_photograph(rng, split)
    photograph = load_photograph(name)
    crops = [random_crop(rng, photograph, size, min_std=0.03, min_mean=0.3) for _ in range(2)]
    if split == "train":
        seed = int(rng.integers(2**31))
        crops = [jitter_colors(np.random.default_rng(seed), crop) for crop in crops]

    def mask(rng: Rng, alpha: Array) -> Array:
        return cover(rng, alpha, mask_kind)

    return compose_kind(
        rng, kind, crops[0], crops[1], cover=mask, mask_kind=mask_kind, photograph=name
    )
