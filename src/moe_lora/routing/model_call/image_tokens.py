"""Which of a call's packed tokens are the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_lora.families import ReferencePosition

Grid = tuple[int, int]
"""Rows and columns of image tokens."""


@dataclass(frozen=True)
class ImageTokens:
    """The image's place among packed tokens; the other tokens are references.

    Args:
        total: number of packed tokens.
        first: index of the image's first token.
        frames: number of frames of the image.
        grid: `(rows, columns)` of a frame.
    """

    total: int
    first: int
    frames: int
    grid: tuple[int, int]

    @property
    def count(self) -> int:
        """Return the number of the image's tokens."""
        return self.frames * self.grid[0] * self.grid[1]

    def one_image(self, hidden: Tensor) -> Tensor:
        """Average the image's tokens over its frames, `(B, total, D)` to `(B, T, D)`."""
        image = hidden[:, self.first : self.first + self.count]
        averaged: Tensor = image.unflatten(1, (self.frames, -1)).mean(dim=1)
        return averaged

    def spread(self, weights: Tensor) -> Tensor:
        """Extend token weights to all packed tokens, `(B, T, E)` to `(B, total, E)`.

        Every frame takes the weights of one frame, and references the mean over the image.

        Raises:
            ValueError: for another `T` than that of a frame, of the image or of all tokens.
        """
        tokens = weights.shape[1]
        if tokens == self.total:
            return weights
        if tokens == self.count // self.frames:
            weights = weights.repeat(1, self.frames, 1)
        elif tokens != self.count:
            raise ValueError(
                f"Expected routing weights for the {self.count} image tokens of the call, or for "
                f"all its {self.total} tokens, but got weights for {tokens} tokens."
            )
        mean = weights.mean(dim=1, keepdim=True)
        before, after = self.first, self.total - self.first - self.count
        return torch.cat([mean.expand(-1, before, -1), weights, mean.expand(-1, after, -1)], dim=1)


def find_image_tokens(
    arguments: Mapping[str, Any], total: int, references: ReferencePosition
) -> ImageTokens | None:
    """Find the image among packed tokens.

    FLUX numbers its tokens (`img_ids`), Qwen-Image gives the sizes of its images (`img_shapes`),
    LTX its own (`num_frames`, `height`, `width`).

    Args:
        arguments: the call's arguments by name.
        total: number of packed tokens.
        references: where the model's family puts reference images.

    Returns:
        The image's tokens; None where no argument describes them.

    Raises:
        ValueError: the arguments contradict the number of tokens.
    """
    if arguments.get("img_ids") is not None:
        return _numbered(arguments["img_ids"], total)
    shape = _shape_of_image(arguments, 0 if references == "last" else -1)
    if shape is None:
        return None
    frames, rows, columns = shape
    tokens = frames * rows * columns
    if tokens > total:
        raise ValueError(
            f"Expected {frames} * {rows} * {columns} image tokens (frames, rows, columns), as the "
            f"call says, but got {total}."
        )
    first = 0 if references == "last" else total - tokens
    return ImageTokens(total, first, frames, (rows, columns))


def _shape_of_image(arguments: Mapping[str, Any], place: int) -> tuple[int, int, int] | None:
    # Qwen-Image: (frames, rows, columns) of every image of every sample. LTX: three arguments.
    shapes = arguments.get("img_shapes")
    if shapes is None:
        shapes = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
        return None if None in shapes else (int(shapes[0]), int(shapes[1]), int(shapes[2]))
    samples = shapes if isinstance(shapes, list) else [shapes]
    own = {tuple(images[place]) if isinstance(images, list) else images for images in samples}
    if len(own) > 1:
        raise ValueError(
            f"Expected images of one size for the router to read, but got `img_shapes` {shapes}. "
            "Call the model once for each size, or route by hand with "
            "moe_lora.route(model, weights)."
        )
    frames, rows, columns = own.pop()
    return int(frames), int(rows), int(columns)


def _numbered(ids: Tensor, total: int) -> ImageTokens:
    # ids[..., 1] is the row, ids[..., 2] the column; ids[..., 0] tells the reference images that
    # follow from the image.
    ids = ids[0] if ids.ndim == 3 else ids
    is_image = (ids[:, 0] == ids[0, 0]).long().cumprod(0)
    last = (ids[:, 1:3].long() * is_image[:, None]).amax(dim=0)
    count, rows, columns = torch.stack([is_image.sum(), *(last + 1)]).tolist()
    if rows * columns != count or len(ids) != total:
        raise ValueError(
            f"Expected `img_ids` to number the {total} image tokens, but got {rows} rows "
            f"of {columns}. Give the grid with moe_lora.set_router_inputs(model, grid_size=...)."
        )
    return ImageTokens(total, 0, 1, (rows, columns))
