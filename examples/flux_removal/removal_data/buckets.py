"""Choose the size that a sample is scaled and cropped to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from removal_data.options import DataOptions

Size = tuple[int, int]

WIDEST = 2.0
"""Largest ratio of the sides of a bucket; that of 512x1024."""

MOST_CROPPED = 1.5
"""Samples move to another bucket as long as their aspect ratios differ by this factor at most."""


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """List the buckets: for every width, the largest height with at most resolution² pixels.

    Args:
        resolution: side in pixels of a square with the most pixels.
        step: of which all sides are multiples.

    Example:
        >>> bucket_sizes(256, 64)
        [(192, 320), (256, 256), (320, 192)]
    """
    found = []
    for width in range(step, 2 * resolution + 1, step):
        height = resolution**2 // width // step * step
        if height and max(width, height) <= WIDEST * min(width, height):
            found.append((width, height))
    return found


def distance(first: Size, second: Size) -> float:
    """Return the absolute logarithm of the ratio of two aspect ratios."""
    return abs(math.log(first[0] * second[1] / (first[1] * second[0])))


def assign_buckets(sizes: Sequence[Size], options: DataOptions, *, batch_size: int) -> list[Size]:
    """Assign a bucket to every sample, by its aspect ratio.

    Samples of buckets with less than a batch move to the bucket with the most similar aspect ratio,
    smallest buckets first, unless this would crop more than a third of an image.

    Args:
        sizes: width and height of the upright images.
        options: with a resolution.
        batch_size: samples that a bucket should have at least.

    Returns:
        Width and height by sample.
    """
    assert options.resolution is not None  # without it there are no buckets
    known = bucket_sizes(options.resolution, options.bucket_step)
    nearest = {size: min(known, key=partial(distance, size)) for size in set(sizes)}
    found = [nearest[size] for size in sizes]
    settled: set[Size] = set()
    while True:
        members: dict[Size, list[int]] = {}
        for index, bucket in enumerate(found):
            members.setdefault(bucket, []).append(index)
        small = [b for b in members if len(members[b]) < batch_size and b not in settled]
        if not small:
            return found
        bucket = min(small, key=lambda bucket: (len(members[bucket]), bucket))
        settled.add(bucket)
        others = sorted(other for other in members if other != bucket)
        for index in members[bucket] if others else []:
            similar = min(others, key=partial(distance, sizes[index]))
            if distance(sizes[index], similar) <= math.log(MOST_CROPPED):
                found[index] = similar
