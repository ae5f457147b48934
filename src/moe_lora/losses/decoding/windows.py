"""Windows of latents: where a loss needs a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lora.masks import check_mask
from moe_lora.masks.analysis.window import bounding_box
from moe_lora.masks.validation import check_integer, check_size

_VISIBLE = 0.05
AGREEMENT = {torch.float64: 1e-6, torch.float32: 1e-2}
"""How far a window's pixels may be from the whole picture's; float32 convolutions of CUDA devices
round to ten bits. Half precision has 0.1, as its rounding differs between sizes."""


class Window(NamedTuple):
    """Place a window in latents, in latent pixels; the ends are exclusive."""

    x0: int
    y0: int
    x1: int
    y1: int

    @property
    def empty(self) -> bool:
        """Tell whether nothing is inside."""
        return self.x1 <= self.x0 or self.y1 <= self.y0

    def times(self, scale: int) -> Window:
        """Place the same window in a map of `scale` times the size."""
        return Window(*(scale * place for place in self))

    def enlarged(self, by: int, size: tuple[int, int]) -> Window:
        """Place a window that is larger by so much on each side, within `(h, w)`."""
        height, width = size
        return Window(
            max(self.x0 - by, 0),
            max(self.y0 - by, 0),
            min(self.x1 + by, width),
            min(self.y1 + by, height),
        )

    def within(self, larger: Window) -> Window:
        """Place the same window in what another one cuts out."""
        x, y = larger.x0, larger.y0
        return Window(self.x0 - x, self.y0 - y, self.x1 - x, self.y1 - y)

    def of(self, features: Tensor) -> Tensor:
        """Cut the window out of `(..., H, W)`."""
        return features[..., self.y0 : self.y1, self.x0 : self.x1]


def latent_windows(mask: Tensor, latent_size: tuple[int, int], margin: int) -> list[Window]:
    """Find the latents that a mask and its surroundings are decoded from.

    The bounding box of all values of at least 0.05, enlarged to whole latent pixels, and then by
    the margin as far as there are latents. On CUDA this waits for the device once.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1], pixel space; 1 = remove.
        latent_size: `(h, w)`.
        margin: latent pixels on each side, an integer >= 0.

    Returns:
        For each sample `(x0, y0, x1, y1)` in latent pixels, the ends exclusive; zeros for an empty
        mask.

    Raises:
        TypeError, ValueError: for a mask that `moe_lora.masks.check_mask` refuses.
        ValueError: `latent_size` is not two integers >= 1, or `margin` not an integer >= 0.

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
    """Check that there is a window for every sample, and that it lies in the latents.

    Args:
        windows: `(x0, y0, x1, y1)` each, integers.
        latents: `(B, C, h, w)`.

    Returns:
        The windows.

    Raises:
        ValueError: for another number of windows, or one that is not in the latents.

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
    places = [Window(*(int(place) for place in window)) for window in windows]
    for x0, y0, x1, y1 in places:
        if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
            raise ValueError(
                f"Expected a window (x0, y0, x1, y1) within {width} columns and {height} rows, "
                f"but got {(x0, y0, x1, y1)}."
            )
    return places


def check_agreement(part: Tensor, whole: Tensor) -> None:
    """Raise unless a window was decoded to what it is in the whole picture.

    Args:
        part: `(1, 3, H, W)`, the window by itself, images around [0, 1].
        whole: the same place of the whole picture.

    Raises:
        ValueError: for another shape, or values further from each other than rounding explains.

    Example:
        >>> check_agreement(torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2))
    """
    tolerance = AGREEMENT.get(whole.dtype, 0.1)
    same = part.shape == whole.shape
    if same and torch.isclose(part, whole, tolerance, tolerance, equal_nan=True).all():
        return
    off = f"{(part - whole).abs().max().item():.2g}" if same else f"{tuple(part.shape)} pixels"
    raise ValueError(
        f"Expected a window to be decoded to what it is in the whole picture within {tolerance}, "
        f"but got {off}: this VAE has layers that see further than those that are known. Decode "
        "without windows."
    )
