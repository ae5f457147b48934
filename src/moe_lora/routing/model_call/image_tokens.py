"""The image among the packed tokens of a call."""

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
    """Position of the image in the packed tokens; the other tokens are references.

    Args:
        total: number of packed tokens.
        first: index of the first image token.
        frames: number of frames.
        grid: `(rows, columns)` of a frame.
    """

    total: int
    first: int
    frames: int
    grid: tuple[int, int]

    @property
    def count(self) -> int:
        """Return the number of image tokens."""
        return self.frames * self.grid[0] * self.grid[1]

    def average_frames(self, hidden: Tensor) -> Tensor:
        """Average the image tokens over the frames, `(B, total, D)` to `(B, T, D)`."""
        image = hidden[:, self.first : self.first + self.count]
        averaged: Tensor = image.unflatten(1, (self.frames, -1)).mean(dim=1)
        return averaged

    def expand_weights(self, weights: Tensor) -> Tensor:
        """Expand token weights to all packed tokens, `(B, T, E)` to `(B, total, E)`.

        Every frame gets the weights of one frame, and references get the mean over the image.

        Args:
            weights: `(B, T, E)`, for the tokens of a frame, of the image or of the call.

        Raises:
            ValueError: for any other number of tokens.
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

    The position follows from the token ids of FLUX (`img_ids`), the image sizes of Qwen-Image
    (`img_shapes`) or the video size of LTX (`num_frames`, `height`, `width`).

    Args:
        arguments: the call's arguments by name.
        total: number of packed tokens.
        references: position of reference images in the model's family.

    Returns:
        The image tokens; `None` when no argument describes them.

    Raises:
        ValueError: when the arguments contradict the number of tokens.
    """
    if arguments.get("img_ids") is not None:
        return _from_token_ids(arguments["img_ids"], total)
    shape = _image_shape(arguments, 0 if references == "last" else -1)
    if shape is None:
        return None
    frames, rows, columns = shape
    tokens = frames * rows * columns
    if tokens > total:
        raise ValueError(
            f"Expected {frames} * {rows} * {columns} image tokens (frames, rows, columns), from "
            f"the arguments of the call, but got {total}."
        )
    first = 0 if references == "last" else total - tokens
    return ImageTokens(total, first, frames, (rows, columns))


def _image_shape(arguments: Mapping[str, Any], index: int) -> tuple[int, int, int] | None:
    # Qwen-Image: (frames, rows, columns) of every image of every sample. LTX: three arguments.
    shapes = arguments.get("img_shapes")
    if shapes is None:
        shapes = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
        return None if None in shapes else (int(shapes[0]), int(shapes[1]), int(shapes[2]))
    samples = shapes if isinstance(shapes, list) else [shapes]
    sizes = {tuple(images[index]) if isinstance(images, list) else images for images in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"Expected images of one size for the router, but got `img_shapes` {shapes}. Call the "
            "model once per size, or set the weights with moe_lora.route(model, weights)."
        )
    frames, rows, columns = sizes.pop()
    return int(frames), int(rows), int(columns)


def _from_token_ids(ids: Tensor, total: int) -> ImageTokens:
    # ids[..., 1] is the row, ids[..., 2] the column; ids[..., 0] distinguishes the image from the
    # reference images after it.
    ids = ids[0] if ids.ndim == 3 else ids
    is_image = (ids[:, 0] == ids[0, 0]).long().cumprod(0)
    last = (ids[:, 1:3].long() * is_image[:, None]).amax(dim=0)
    count, rows, columns = torch.stack([is_image.sum(), *(last + 1)]).tolist()
    if rows * columns != count or len(ids) != total:
        raise ValueError(
            f"Expected `img_ids` to number the {total} image tokens, but got {rows} rows "
            f"of {columns}. Set the grid with moe_lora.set_router_inputs(model, grid_size=...)."
        )
    return ImageTokens(total, 0, 1, (rows, columns))
