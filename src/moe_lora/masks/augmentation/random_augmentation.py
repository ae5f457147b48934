"""Draw an augmentation for every mask of a batch."""

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
"""Random numbers for each sample: what is done, and eight for how it is done."""

Apply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From masks `(B, 1, H, W)`, the shorter side of their boxes `(B,)`, and numbers `(B, 8)`."""

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
"""The names of all augmentations, and how probable each is by default."""


def augment(
    mask: Tensor,
    generator: torch.Generator | None = None,
    *,
    probabilities: Mapping[str, float] = AUGMENTATIONS,
    max_area: float = 0.7,
) -> Tensor:
    """Draw masks anew as someone might have drawn them.

    For every sample one augmentation is drawn, or none, and its parameters: with s the shorter side
    of the mask's bounding box,

    - `dilate` by 0.03 s to 0.2 s, `erode` by 0.02 s to 0.15 s, but at least by one pixel;
    - `convex_hull`;
    - `box`, with a margin of up to 0.15 s; `ellipse`, 1 to 1.42 times as large as the box;
    - `strokes`, through seven pixels of the mask with a brush radius of 0.05 s to 0.2 s;
    - `bezier_box`, with control points from 0.15 s inside to 0.3 s outside the box.

    A result that is empty or covers more than `max_area` of the image is dropped, and the sample's
    mask stays as it is, soft values included. Each sample takes nine numbers from the generator,
    whatever is done with them, and is drawn from its own numbers alone.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        generator: of random numbers, on any device; `None` for the global one of the CPU.
        probabilities: by name, each >= 0, of a sum <= 1; what is missing to 1 leaves the mask as it
            is. 1/8 for each of the seven by default.
        max_area: the most of the image that a result may cover, in (0, 1].

    Returns:
        `(B, 1, H, W)`, float32 in [0, 1], without gradient.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.
        ValueError: for an unknown name, probabilities that are negative or of a sum above 1, or
            `max_area` out of range.

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
            f"Expected `probabilities` to name augmentations of {list(_APPLY)}, but got {unknown}."
        )
    values = torch.tensor(list(probabilities.values()), dtype=torch.float64)
    if not bool((values >= 0).all()) or not values.sum() <= 1 + 1e-6:
        raise ValueError(
            "Expected `probabilities` to be >= 0 and of a sum <= 1, "
            f"but got {list(probabilities.values())}."
        )
    return values.cumsum(0)


def _between(number: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * number
