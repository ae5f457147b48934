"""Scale numbers of any type to 8 bits, by the range that they were stored in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

USUAL_MAXIMA = {"f": (1, 2**8 - 1, 2**16 - 1), "u": (2**8 - 1, 2**16 - 1, 2**32 - 1)}
USUAL_MAXIMA["i"] = (2**8 - 1, 2**16 - 1, 2**31 - 1)


def value_range(values: Array, bits: int) -> tuple[float, float]:
    """Find which values are black and white.

    Integers of up to 16 bits use the range of their type. Wider integers and floats say nothing of
    their range: it ends at the usual maximum (1 for floats, 255, 65535, the type's own) that their
    maximum reaches at least a quarter of, else at their own maximum. With negative values the range
    is that of the values; the small overshoot of a resampled float image is cut instead.

    Args:
        values: any shape, integers or floats.
        bits: of a stored value, at most as many as the type has.

    Returns:
        The values of black and white.

    Raises:
        ValueError: values are infinite or not a number.

    Example:
        >>> value_range(np.array([0, 4000], dtype=np.uint16), 12)
        (0, 4095)
        >>> value_range(np.array([-0.01, 0.3]), 32)
        (0, 1)
    """
    if not np.isfinite(values).all():
        raise ValueError("it has values that are infinite or not a number")
    low, high, kind = values.min().item(), values.max().item(), values.dtype.kind
    if low < (-0.1 * high if kind == "f" else 0):
        return low, max(high, low + 1e-6)
    if kind != "f" and bits <= 16:
        return 0, 2 ** (bits - (kind == "i")) - 1
    first, *others = USUAL_MAXIMA[kind]
    overshoot = 1.1 if kind == "f" else 1
    if high <= overshoot * first:
        return 0, first
    return 0, next((m for m in others if m / 4 <= high <= overshoot * m), high)


def to_eight_bits(values: Array, limits: tuple[float, float]) -> Array:
    """Scale values to uint8, from black to white of `value_range`."""
    low, high = limits
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    result: Array = scaled.round().clip(0, 255).astype(np.uint8)
    return result
