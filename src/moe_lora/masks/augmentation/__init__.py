"""Mask augmentations: morphology, convex hulls, boxes, ellipses and brush strokes.

All functions are batched, threshold masks at 0.5, return zeros and ones without gradient, and keep
empty masks empty. They are deterministic; parameters are scalars or one value per sample. `augment`
samples an augmentation and its parameters at random.
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
