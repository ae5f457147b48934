"""Crops around the parts of a mask, at the size of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from moe_lora.masks.parts import part_boxes
from moe_lora.masks.validation import check_integer, check_mask

_LEAST_SCALE = 2 / 3
"""Parts share a crop unless it is smaller by this factor than the smallest of their own."""


@dataclass(frozen=True)
class CropBox:
    """A part of an image, and the size at which a model edits it.

    Args:
        top: first row.
        left: first column.
        height: number of rows, >= 1.
        width: number of columns, >= 1.
        size: `(rows, columns)` that the crop is reduced to, at most `(height, width)`.
        parts: bounding boxes of the parts of the mask that the crop was made for, in pixels of the
            image: `(top, left, bottom, right)`, end exclusive.

    Example:
        >>> import torch
        >>> box = CropBox(top=1, left=0, height=2, width=3, size=(2, 3))
        >>> box.cut(torch.arange(12.0).view(1, 1, 4, 3))[0, 0].tolist()
        [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    """

    top: int
    left: int
    height: int
    width: int
    size: tuple[int, int]
    parts: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def scale(self) -> float:
        """Side of the reduced crop, relative to that of the crop, in (0, 1]."""
        return min(self.size[0] / self.height, self.size[1] / self.width)

    def cut(self, image: Tensor) -> Tensor:
        """Return the crop of an image `(..., H, W)`, as a view."""
        rows = slice(self.top, self.top + self.height)
        return image[..., rows, self.left : self.left + self.width]


def crop_boxes(
    mask: Tensor,
    resolution: int,
    *,
    context: float = 1.0,
    min_context: int = 32,
    multiple: int = 16,
) -> list[list[CropBox]]:
    """Find crops that contain every masked pixel with its surroundings, at the size of a model.

    A crop is the bounding box of the mask, extended by `max(context · longer side, min_context)`
    pixels on each side, to an aspect ratio of at most 2, and then to `resolution²` pixels. It is
    moved into the image, and never larger. A crop of more pixels is reduced to about
    `resolution²`, a smaller one is not enlarged. An image of at most `resolution²` pixels is its
    own crop.

    Parts of a mask that are far apart have several crops: parts share one as long as it is reduced
    at most 1.5 times as much as the crop of one of them. Parts whose bounding boxes overlap, or
    that are closer than about 1/128 of the image, are one part.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; every pixel above 0 is in a crop.
        resolution: side in pixels of a square of the size that the model works at, an integer >=
            `multiple`.
        context: surroundings on each side, relative to the longer side of the box, >= 0.
        min_context: surroundings on each side in pixels, an integer >= 0.
        multiple: the sides of reduced crops are multiples of it, unless the image is too small.

    Returns:
        The crops of every sample, from top to bottom; none for an empty mask. Crops of a sample may
        overlap. The boxes in `parts` do not, and contain all masked pixels.

    Raises:
        TypeError, ValueError: `mask` is no mask, see `check_mask`.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> mask = torch.zeros(1, 1, 600, 800)
        >>> mask[..., 100:140, 500:580] = 1
        >>> crop_boxes(mask, 256)
        [[CropBox(top=0, left=396, height=240, width=288, size=(240, 288), \
parts=((100, 500, 140, 580),))]]
        >>> crop_boxes(mask, 128)[0][0].size
        (112, 144)
    """
    check_integer(multiple, "multiple", 1)
    check_integer(resolution, "resolution", multiple)
    check_integer(min_context, "min_context", 0)
    if not 0 <= context < math.inf:
        raise ValueError(f"Expected `context` to be >= 0, but got {context}.")
    inside = check_mask(mask).detach() > 0
    height, width = inside.shape[2:]
    frame = _Frame(height, width, resolution**2, context, min_context, multiple)
    return [_boxes_of(sample[0], frame) for sample in inside]


class _Part(NamedTuple):
    """Bounding box of a part of a mask, end exclusive, in pixels."""

    top: int
    left: int
    bottom: int
    right: int

    def join(self, other: _Part) -> _Part:
        top, left = min(self.top, other.top), min(self.left, other.left)
        return _Part(top, left, max(self.bottom, other.bottom), max(self.right, other.right))


class _Frame(NamedTuple):
    """An image, and what is asked of its crops."""

    height: int
    width: int
    area: int
    context: float
    min_context: int
    multiple: int

    def crop(self, part: _Part) -> CropBox:
        """Return the crop around a part."""
        if self.height * self.width <= self.area:
            size = (self.height, self.width)
            return CropBox(0, 0, *size, size, ((*part,),))
        sides = (part.bottom - part.top, part.right - part.left)
        border = 2 * max(math.ceil(self.context * max(sides)), self.min_context)
        height, width = self._extended(sides[0] + border, sides[1] + border)
        if height * width <= self.area:
            height, width = (-(-n // self.multiple) * self.multiple for n in (height, width))
            height, width = min(height, self.height), min(width, self.width)
            size = (height, width)
        else:
            height, width, size = self._reduced(height, width)
        top = max(min((part.top + part.bottom - height) // 2, self.height - height), 0)
        left = max(min((part.left + part.right - width) // 2, self.width - width), 0)
        return CropBox(top, left, height, width, size, ((*part,),))

    def _extended(self, height: int, width: int) -> tuple[int, int]:
        """Extend a crop to an aspect ratio of at most 2, and to the pixels of the model."""
        height, width = min(height, self.height), min(width, self.width)
        height = max(height, min(-(-width // 2), self.height))
        width = max(width, min(-(-height // 2), self.width))
        if height * width < self.area:
            height = min(int(height * math.sqrt(self.area / (height * width))), self.height)
            width = max(width, min(self.area // height, 2 * height, self.width))
            height = max(height, min(self.area // width, 2 * width, self.height))
        return height, width

    def _reduced(self, height: int, width: int) -> tuple[int, int, tuple[int, int]]:
        """Return a crop that is reduced to sides that are multiples, where the image allows it."""
        scale, step = math.sqrt(self.area / (height * width)), self.multiple
        rows = max(round(height * scale / step), 1) * step
        columns = min(math.ceil(width * scale / step), self.area // (rows * step))
        columns = max(columns, 1) * step
        scale = min(rows / height, columns / width, 1.0)
        height = min(max(round(rows / scale), height), self.height)
        width = min(max(round(columns / scale), width), self.width)
        size = (min(rows, round(height * scale)), min(columns, round(width * scale)))
        return height, width, (max(size[0], 1), max(size[1], 1))


def _boxes_of(inside: Tensor, frame: _Frame) -> list[CropBox]:
    """Return the crops of one mask, `(H, W)`, bool."""
    if not inside.any():
        return []
    rows, columns = (inside.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
    whole = frame.crop(_Part(rows[0], columns[0], rows[-1] + 1, columns[-1] + 1))
    if whole.scale == 1:
        return [whole]
    return _join([_Part(*sides) for sides in part_boxes(inside).tolist()], frame.crop)


def _join(parts: list[_Part], crop: Callable[[_Part], CropBox]) -> list[CropBox]:
    """Join parts that share a crop; return the crops."""
    groups: list[tuple[_Part, float, tuple[_Part, ...]]]
    groups = [(part, crop(part).scale, (part,)) for part in parts]
    count = 0
    while count != len(groups):
        count, waiting, groups = len(groups), groups, []
        # Those that are reduced most come first, so that specks join them.
        for part, scale, members in sorted(waiting, key=lambda group: group[1]):
            best, found = 0.0, None
            for index, (other, least, _) in enumerate(groups):
                common = crop(part.join(other)).scale
                if common >= _LEAST_SCALE * min(scale, least) and common > best:
                    best, found = common, index
            if found is None:
                groups.append((part, scale, members))
            else:
                other, least, others = groups[found]
                groups[found] = (part.join(other), min(scale, least), (*others, *members))
    crops = [
        replace(crop(part), parts=tuple(sorted((*member,) for member in members)))
        for part, _, members in groups
    ]
    return sorted(crops, key=lambda box: (box.top, box.left))
