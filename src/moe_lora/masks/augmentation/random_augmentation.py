"""Random augmentation of every mask of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from moe_lora.masks.augmentation.convex_hull import convex_hull
from moe_lora.masks.augmentation.morphology import dilate, erode
from moe_lora.masks.augmentation.parameters import extent
from moe_lora.masks.augmentation.shapes import bezier_box, box, ellipse
from moe_lora.masks.augmentation.strokes import strokes
from moe_lora.masks.validation import check_mask

_NUMBERS = 9
"""Random numbers per sample: one for the augmentation, eight for its parameters."""

Apply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function of masks `(B, 1, H, W)`, shorter sides of their boxes `(B,)` and numbers `(B, 8)`."""

_APPLY: dict[str, Apply] = {
    "dilate": lambda mask, side, u: dilate(mask, (side * _between(u[:, 0], 0.03, 0.2)).clamp(1)),
    "erode": lambda mask, side, u: erode(mask, (side * _between(u[:, 0], 0.02, 0.15)).clamp(1)),
    "convex_hull": lambda mask, side, u: convex_hull(mask),
    "box": lambda mask, side, u: box(mask, side * _between(u[:, 0], 0.0, 0.15)),
    "ellipse": lambda mask, side, u: ellipse(mask, _between(u[:, 0], 1.0, 1.42)),
    "strokes": lambda mask, side, u: strokes(mask, u[:, 1:], side * _between(u[:, 0], 0.05, 0.2)),
    "bezier_box": lambda mask, side, u: bezier_box(
        mask, side[:, None, None] * _between(u, -0.15, 0.3).view(-1, 4, 2)
    ),
}

AUGMENTATIONS: Mapping[str, float] = MappingProxyType(dict.fromkeys(_APPLY, 1 / 8))
"""Default probability of every augmentation, by name."""


def augment(
    mask: Tensor,
    generator: torch.Generator | None = None,
    *,
    probabilities: Mapping[str, float] = AUGMENTATIONS,
    max_area: float = 0.7,
) -> Tensor:
    """Apply a random augmentation to each mask, to simulate masks drawn by users.

    Parameter ranges, with s the shorter side of the mask's bounding box:

    - `dilate` by 0.03 s to 0.2 s, `erode` by 0.02 s to 0.15 s, both by at least one pixel;
    - `convex_hull`;
    - `box` with a margin of up to 0.15 s; `ellipse` with a scale of 1 to 1.42;
    - `strokes` through seven pixels of the mask with a brush radius of 0.05 s to 0.2 s;
    - `bezier_box` with control points from 0.15 s inside to 0.3 s outside the box.

    If the augmented mask is empty or covers more than `max_area` of the image, the sample keeps its
    mask, including soft values. Each sample always consumes nine random numbers, so that its
    augmentation does not depend on the other samples.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        generator: random generator on any device; `None` for the global generator of the CPU.
        probabilities: probability by name of augmentation, each >= 0, with a sum <= 1; the rest is
            the probability of no augmentation. By default 1/8 for each of the seven.
        max_area: largest share of the image for an augmented mask, in (0, 1].

    Returns:
        `(B, 1, H, W)`, float32 in [0, 1], without gradient.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.
        ValueError: if a name is unknown, a probability is negative, their sum exceeds 1, or
            `max_area` is out of range.

    Example:
        >>> mask = torch.zeros(4, 1, 64, 64)
        >>> mask[..., 24:40, 24:40] = 1
        >>> augmented = augment(mask, torch.Generator().manual_seed(0), probabilities={"dilate": 1})
        >>> augmented.sum((1, 2, 3))
        tensor([396., 324., 320., 320.])
    """
    original = check_mask(mask).detach()
    limits = _cumulative(probabilities)
    if not 0 < max_area <= 1:
        raise ValueError(f"Expected `max_area` to be in (0, 1], but got {max_area}.")
    device = torch.device("cpu") if generator is None else generator.device
    numbers = torch.rand(len(mask), _NUMBERS, generator=generator, device=device)
    chosen = torch.bucketize(numbers[:, 0].contiguous(), limits.to(device), right=True).tolist()
    numbers = numbers.to(original.device)
    result = original.clone()
    for index, name in enumerate(probabilities):
        rows = [row for row, choice in enumerate(chosen) if choice == index]
        if rows:
            masks = original[rows]
            x0, y0, x1, y1 = (edge.flatten() for edge in extent((masks >= 0.5).float()))
            side = torch.minimum(x1 - x0, y1 - y0)
            result[rows] = _APPLY[name](masks, side, numbers[rows, 1:])
    area = (result >= 0.5).float().mean((1, 2, 3), keepdim=True)
    return torch.where((area > 0) & (area <= max_area), result, original)


def _cumulative(probabilities: Mapping[str, float]) -> Tensor:
    unknown = [name for name in probabilities if name not in _APPLY]
    if unknown:
        raise ValueError(
            f"Expected `probabilities` to have keys of {list(_APPLY)}, but got {unknown}."
        )
    values = torch.tensor(list(probabilities.values()), dtype=torch.float64)
    if not bool((values >= 0).all()) or not values.sum() <= 1 + 1e-6:
        raise ValueError(
            "Expected `probabilities` to be >= 0 with a sum <= 1, "
            f"but got {list(probabilities.values())}."
        )
    return values.cumsum(0)


def _between(number: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * number
