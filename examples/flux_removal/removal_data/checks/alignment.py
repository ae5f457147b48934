"""Find the shift between two images."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def estimate_shift(first: Array, second: Array) -> tuple[int, int]:
    """Estimate by how many rows and columns `second` is shifted against `first`.

    Phase correlation: the peak of the inverse Fourier transform of F1* F2 / |F1* F2|.

    Args:
        first: `(H, W)`, gray.
        second: `(H, W)`, gray.

    Returns:
        `(rows, columns)`, such that `second[y + rows, x + columns]` shows `first[y, x]`.

    Example:
        >>> image = np.random.default_rng(0).random((32, 48), dtype=np.float32)
        >>> estimate_shift(image, np.roll(image, (3, -5), (0, 1)))
        (3, -5)
    """
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    spectra = [np.fft.rfft2((image - image.mean()) * window) for image in (first, second)]
    cross = spectra[0].conj() * spectra[1]
    peak = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-12), s=first.shape)
    place = np.unravel_index(int(peak.argmax()), peak.shape)
    rows, columns = (
        int(offset) - side if offset > side // 2 else int(offset)
        for offset, side in zip(place, first.shape, strict=True)
    )
    return rows, columns


def overlap(first: Array, second: Array, shift: tuple[int, int]) -> tuple[Array, Array]:
    """Return the parts of two maps `(H, W)` that show the same, given the shift between them."""
    cuts = []
    for rows, columns in ((-shift[0], -shift[1]), shift):
        height, width = first.shape
        cuts.append(
            (
                slice(max(0, rows), min(height, height + rows)),
                slice(max(0, columns), min(width, width + columns)),
            )
        )
    return first[cuts[0]], second[cuts[1]]
