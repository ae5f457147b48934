"""Masks as users draw them: too tight, too loose, boxes, ovals and brush strokes.

All functions are batched and without gradient, see `mask >= 0.5`, return zeros and ones, and leave
an empty mask empty. They draw nothing at random: their parameters may be one number, or one for
each sample. `augment` draws what is done and how much.
"""

from __future__ import annotations

from moe_lora.masks.augmentation.convex_hull import convex_hull
from moe_lora.masks.augmentation.morphology import dilate, erode
from moe_lora.masks.augmentation.random_augmentation import AUGMENTATIONS, augment
from moe_lora.masks.augmentation.shapes import bezier_box, box, ellipse
from moe_lora.masks.augmentation.strokes import strokes

__all__ = [
    "AUGMENTATIONS",
    "augment",
    "bezier_box",
    "box",
    "convex_hull",
    "dilate",
    "ellipse",
    "erode",
    "strokes",
]
