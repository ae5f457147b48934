"""Windows of latents within which a loss has a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.masks import check_mask
from moe_lora.masks.analysis.area import bounding_box
from moe_lora.masks.validation import check_integer, check_size

_VISIBLE = 0.05
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Tolerance between the pixels of a window and of the whole image. float32 convolutions on CUDA
devices round to ten bits (TF32). The tolerance of half precision is 0.1."""


class Window(NamedTuple):
    """Rectangle `(x0, y0, x1, y1)` in latent pixels; the end is exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def empty(self) -> bool:
        """Whether the window contains no pixel."""
        return self.x1 <= self.x0 or self.y1 <= self.y0

    def times(self, scale: int) -> Window:
        """Scale the window to a map of `scale` times the size."""
        return Window(*(scale * edge for edge in self))

    def enlarged(self, by: int, size: tuple[int, int]) -> Window:
        """Enlarge the window by `by` pixels on each side, within `(h, w)`."""
        height, width = size
        return Window(
            max(self.x0 - by, 0),
            max(self.y0 - by, 0),
            min(self.x1 + by, width),
            min(self.y1 + by, height),
        )

    def within(self, larger: Window) -> Window:
        """Return the window in the coordinates of a larger window."""
        x, y = larger.x0, larger.y0
        return Window(self.x0 - x, self.y0 - y, self.x1 - x, self.y1 - y)

    def of(self, features: Tensor) -> Tensor:
        """Crop `(..., H, W)` to the window."""
        return features[..., self.y0 : self.y1, self.x0 : self.x1]


def latent_windows(mask: Tensor, latent_size: tuple[int, int], margin: int) -> list[Window]:
    """Compute the window of latents around each mask.

    The window is the bounding box of all mask values of at least 0.05, rounded outwards to latent
    pixels and enlarged by `margin` within the latents. On CUDA the call synchronizes once.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        latent_size: `(h, w)` of the latents.
        margin: latent pixels on each side, an integer >= 0.

    Returns:
        `(x0, y0, x1, y1)` per sample, in latent pixels, end exclusive; zeros for an empty mask.

    Raises:
        TypeError, ValueError: if `mask` is invalid, see `moe_lora.masks.check_mask`.
        ValueError: if `latent_size` is not two integers >= 1, or `margin` not an integer >= 0.

    Example:
        >>> mask = torch.zeros(1, 1, 64, 96)
        >>> mask[..., 20:40, 8:24] = 1
        >>> latent_windows(mask, (8, 12), margin=1)
        [Window(x0=0, y0=1, x1=4, y1=6)]
    """
    check_integer(margin, "margin", 0)
    rows, columns = check_size(latent_size, "latent_size")
    values = check_mask(mask).detach()[:, 0]
    height, width = values.shape[1:]
    boxes = bounding_box(values.amax(2), values.amax(1), _VISIBLE).tolist()
    windows = []
    for x0, y0, x1, y1 in boxes:
        if x1 <= x0:
            windows.append(Window(0, 0, 0, 0))
            continue
        left, right = x0 * columns // width, -(-x1 * columns // width)
        top, bottom = y0 * rows // height, -(-y1 * rows // height)
        windows.append(Window(left, top, right, bottom).enlarged(margin, (rows, columns)))
    return windows


def check_windows(windows: Sequence[Sequence[int]], latents: Tensor) -> list[Window]:
    """Check that every sample has a window within the latents.

    Args:
        windows: `(x0, y0, x1, y1)` per sample, integers.
        latents: `(B, C, h, w)`.

    Returns:
        The windows.

    Raises:
        ValueError: if the number of windows is not B, or a window is not within the latents.

    Example:
        >>> check_windows([(0, 0, 2, 1)], torch.zeros(1, 4, 8, 8))
        [Window(x0=0, y0=0, x1=2, y1=1)]
    """
    if len(windows) != len(latents):
        raise ValueError(
            f"Expected `windows` to have one entry for each of {len(latents)} samples, "
            f"but got {len(windows)}."
        )
    height, width = latents.shape[2:]
    checked = [Window(*(int(edge) for edge in window)) for window in windows]
    for x0, y0, x1, y1 in checked:
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise ValueError(
                f"Expected a window (x0, y0, x1, y1) within {width} columns and {height} rows, "
                f"but got {(x0, y0, x1, y1)}."
            )
    return checked


def check_agreement(part: Tensor, whole: Tensor) -> None:
    """Check that a decoded window equals the same region of the whole decoded image.

    Args:
        part: `(1, 3, H, W)`, decoded window, around [0, 1].
        whole: `(1, 3, H, W)`, the same region of the whole decoded image.

    Raises:
        ValueError: if shapes differ, or values differ by more than rounding.

    Example:
        >>> check_agreement(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2))
    """
    tolerance = AGREEMENT.get(whole.dtype, 0.1)
    same = part.shape == whole.shape
    if same and torch.isclose(part, whole, tolerance, tolerance, equal_nan=True).all():
        return
    off = f"a difference of {(part - whole).abs().max():.2g}" if same else f"{tuple(part.shape)}"
    raise ValueError(
        f"Expected a decoded window to equal the whole decoded image within {tolerance}, but got "
        f"{off}: the VAE has layers of an unsupported kind. Decode without windows."
    )
