"""Where the weights of a call belong: which sample a row is for, and which token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.alignment import level_of, resample

CHANNELS_LAST = ("Kandinsky5Transformer3DModel", "Kandinsky6Transformer3DModel")
FRAMES_FIRST = (
    "AnyFlowTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "ConsisIDTransformer3DModel",
    "UNetSpatioTemporalConditionModel",
)
_REFERENCES_FIRST = ("QwenImage21Transformer2DModel",)


@dataclass(frozen=True)
class ImageTokens:
    """Tell which of a call's packed tokens are the image that is made; the others are references.

    Args:
        total: all packed tokens.
        first: where the image starts.
        frames: of the image.
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

    def one_picture(self, hidden: Tensor) -> Tensor:
        """Average the image's tokens over its frames, `(B, total, D)` to `(B, T, D)`."""
        image = hidden[:, self.first : self.first + self.count]
        picture: Tensor = image.unflatten(1, (self.frames, -1)).mean(dim=1)
        return picture

    def spread(self, weights: Tensor) -> Tensor:
        """Give every packed token its weights, `(B, T, E)` to `(B, total, E)`.

        Every frame takes the picture's weights, and references the mean of them.

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


def image_tokens(arguments: Mapping[str, Any], total: int, model: nn.Module) -> ImageTokens | None:
    """Find the image among a call's packed tokens, as far as the call tells.

    FLUX numbers its tokens (`img_ids`), Qwen-Image gives the sizes of its images (`img_shapes`),
    LTX its own (`num_frames`, `height`, `width`).

    Args:
        arguments: the call's arguments by name.
        total: the number of packed tokens.
        model: the model that is called.

    Raises:
        ValueError: when what the call tells contradicts the number of its tokens.
    """
    if arguments.get("img_ids") is not None:
        return _numbered(arguments["img_ids"], total)
    last = type(model).__name__ in _REFERENCES_FIRST
    shape = _shape_of_image(arguments, -1 if last else 0)
    if shape is None:
        return None
    frames, rows, columns = shape
    tokens = frames * rows * columns
    if tokens > total:
        raise ValueError(
            f"Expected {frames} * {rows} * {columns} image tokens (frames, rows, columns), as the "
            f"call says, but got {total}."
        )
    return ImageTokens(total, total - tokens if last else 0, frames, (rows, columns))


def place_tokens(
    weights: Tensor, latents: Tensor, arguments: Mapping[str, Any], model: nn.Module
) -> tuple[Tensor, tuple[int, int] | None]:
    """Fit token weights to the tokens that a model makes of its latents.

    Of an image, they may be given for every latent pixel or at any resolution that
    `moe_lora.alignment.level_of` describes; where the model cuts it into patches, they are averaged
    over these. Those of a picture serve every frame of a video. Of packed tokens see
    `ImageTokens.spread`.

    Args:
        weights: `(B, T, E)`.
        latents: what the model is called with.
        arguments: the call's arguments by name.
        model: the model that is called.

    Returns:
        The weights `(B, T', E)`, and the `(rows, columns)` of images, which a model may resample.

    Raises:
        ValueError: when the call tells which of its tokens are the image, and there are weights for
            another number.
    """
    if latents.ndim == 3 and weights.shape[1] != latents.shape[1]:
        where = image_tokens(arguments, latents.shape[1], model)
        return weights if where is None else where.spread(weights), None
    if latents.ndim not in (4, 5):
        return weights, None
    patch = _patch_size(model, latents.ndim - 2)
    pixels = (int(latents.shape[-2]), int(latents.shape[-1]))
    grid = level_of(pixels, (weights.shape[1],))
    if patch is None:
        return (weights, grid) if latents.ndim == 4 else (weights, None)
    size = (pixels[0] // patch[1], pixels[1] // patch[2])
    if grid is not None:
        weights, grid = resample(weights, grid, size), size
    if latents.ndim == 5:
        frames = latents.shape[2] // patch[0]
        return ImageTokens(frames * size[0] * size[1], 0, frames, size).spread(weights), None
    return weights, grid


def _patch_size(model: nn.Module, dimensions: int) -> tuple[int, int, int] | None:
    """Return `(frames, rows, columns)` of the patches that a model cuts latents into, if it tells.

    UNets cut none. Videos are left alone where channels do not come before frames, or where it is
    not told how many frames a patch has.
    """
    names = {cls.__name__ for cls in type(model).__mro__}
    if dimensions == 3 and names.intersection((*CHANNELS_LAST, *FRAMES_FIRST)):
        return None
    config = getattr(model, "config", None)
    size, frames = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, tuple | list) or (dimensions == 3 and len(size) + bool(frames) < 3):
        return None
    found = (1, 1, *size) if frames is None else (frames, *size)
    return int(found[-3]), int(found[-2]), int(found[-1])


def sample_index(given: int, latents: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Tell which of the given rows every sample of a call belongs to.

    Pipelines make more samples of the given ones in two ways. For guidance they repeat the whole
    batch, which shows in latents that repeat. For several images of a prompt they repeat every
    sample, which shows in its other inputs, such as text.

    Args:
        given: the number of rows; one serves all samples.
        latents: `(B, ...)`, what the model is called with.
        arguments: the call's arguments by name.

    Returns:
        `(B,)` indices into the rows; `None` when the rows are the samples already.

    Raises:
        ValueError: when `B` is no multiple of the rows, or the call does not tell which row is
            whose.

    Example:
        >>> sample_index(2, torch.tensor([[1.0], [2.0], [1.0], [2.0]]), {}).tolist()
        [0, 1, 0, 1]
    """
    needed = latents.shape[0]
    if given == needed:
        return None
    if given == 1:
        return torch.zeros(needed, dtype=torch.long, device=latents.device)
    if needed % given:
        raise ValueError(
            f"Expected a mask, or routing weights, for the {needed} samples of the call (or for "
            f"one, which then serves all), but got {given}."
        )
    times = needed // given
    rows = torch.arange(given, device=latents.device)
    alike = bool((latents == latents[:1]).all())
    for copies in (n for n in range(times, 0, -1) if times % n == 0):
        images = times // copies
        if _repeats(latents, copies) and not alike:
            index = rows.repeat_interleave(images)
            if images == 1 or _tells(arguments, latents, index, rows.repeat(images)):
                return index.repeat(copies)
            break
    raise ValueError(
        f"Expected a mask, or routing weights, for the {needed} samples of the call, but got "
        f"{given}, and the call does not tell which of these each is for. Give one for each: "
        f"mask.repeat_interleave({times}, dim=0) for {times} images of every prompt, "
        f"mask.repeat({times}, 1, 1, 1) where the whole batch is repeated."
    )


def _repeats(values: Tensor, copies: int) -> bool:
    parts = values.unflatten(0, (copies, -1))
    return bool((parts == parts[:1]).all())


def _tells(arguments: Mapping[str, Any], latents: Tensor, index: Tensor, other: Tensor) -> bool:
    """Tell whether a call's other inputs follow one index, and not the other one."""
    conditions = [
        value
        for value in arguments.values()
        if isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim > 1
        and value.shape[0] == latents.shape[0]
        and value.shape != latents.shape
    ]
    follows = [
        [_follows(part, rows) for value in conditions for part in value.split(len(rows))]
        for rows in (index, other)
    ]
    return bool(conditions) and all(follows[0]) and not all(follows[1])


def _follows(values: Tensor, index: Tensor) -> bool:
    """Tell whether values are alike wherever the index is."""
    first = (index[:, None] == index).long().argmax(dim=1)
    return bool((values == values[first]).all())


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
    same = (ids[:, 0] == ids[0, 0]).long()
    image = ids[: int(same.cumprod(0).sum())]
    rows, columns = (int(index) + 1 for index in image[:, 1:3].amax(dim=0).tolist())
    if rows * columns != len(image) or len(ids) != total:
        raise ValueError(
            f"Expected `img_ids` to number the {total} image tokens, but got {rows} rows "
            f"of {columns}. Give the grid with moe_lora.set_router_inputs(model, grid_size=...)."
        )
    return ImageTokens(total, 0, 1, (rows, columns))
