"""The router that looks at what lies around the mask."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lora.families import family_of
from moe_lora.masks import to_tokens
from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.headed import HeadedRouter
from moe_lora.routing.routers.registry import register_router

CELLS = 16
"""The side of a frame in cells."""

MARGIN = 1.0
"""What a frame shows on each side of the mask, in units of the mask's longer side."""

SAMPLES = 2
"""Samples per side of a cell, of which a cell is the mean."""

GAIN, SHIFT, NOISE = 0.2, 0.3, 0.1
"""Standard deviations of the augmentation at strength 1, see `augment_frames`."""


def frame_coordinates(mask: Tensor, cells: int = CELLS, margin: float = MARGIN) -> Tensor:
    """Compute a square grid around each mask, three times as large as the mask by default.

    The grid is centered on the bounding box of the masked pixels (mask > 0.5). An empty mask counts
    as a full one.

    Args:
        mask: `(B, 1, H, W)`, in [0, 1].
        cells: the number of rows and columns of the grid.
        margin: the distance from the box to the edge of the grid, in units of the longer side of
            the box.

    Returns:
        `(B, cells, cells, 2)`, the coordinates (x, y) for `torch.nn.functional.grid_sample` with
        `align_corners=False`; pixels of the image are within [-1, 1].

    Example:
        >>> mask = torch.zeros(1, 1, 6, 6)
        >>> mask[:, :, 2:4, 2:4] = 1
        >>> frame_coordinates(mask, cells=3)[0, 0, :, 0].round(decimals=2)
        tensor([-0.6700,  0.0000,  0.6700])
    """
    centers, sides = [], []
    for along, across in ((3, 2), (2, 3)):  # x, then y
        covered = (mask > 0.5).amax(across)[:, 0]
        count = mask.shape[along]
        index = torch.arange(count, device=mask.device)
        first = torch.where(covered, index, count).amin(1)
        last = torch.where(covered, index, -1).amax(1)
        empty = last < 0
        first, last = torch.where(empty, 0, first), torch.where(empty, count - 1, last)
        centers.append((first + last + 1) / count - 1)
        sides.append(last - first + 1)
    side = torch.maximum(*sides).to(torch.float32) * (1 + 2 * margin)
    steps = (torch.arange(cells, device=mask.device) + 0.5) / cells * 2 - 1
    x, y = (
        center[:, None] + steps * (side / count)[:, None]
        for center, count in zip(centers, (mask.shape[3], mask.shape[2]), strict=True)
    )
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)


def augment_frames(frames: Tensor, strength: float = 1.0) -> Tensor:
    """Change frames at random, as other images of the same kind would differ.

    The visual channels are multiplied by `1 + 0.2 · strength · n`, one n per sample, shifted by
    `0.3 · strength · n`, one n per sample and channel, and get noise of standard deviation
    `0.1 · strength`; all n are standard normal. Half of the frames are mirrored.

    Args:
        frames: `(B, C + 2, 16, 16)`; the last two channels, mask and image area, keep their values.
        strength: a factor of all changes of values.
    """
    seen, areas = frames[:, :-2], frames[:, -2:]
    gain = torch.randn_like(seen[:, :1, :1, :1])
    shift = torch.randn_like(seen[:, :, :1, :1])
    noise = torch.randn_like(seen)
    seen = seen * (1 + GAIN * strength * gain) + strength * (SHIFT * shift + NOISE * noise)
    changed = torch.cat([seen, areas], dim=1)
    mirrored = torch.rand_like(changed[:, :1, :1, :1]) < 0.5
    return torch.where(mirrored, changed.flip(3), changed)


@register_router("surroundings")
class SurroundingsRouter(HeadedRouter):
    """Router between any number of experts, from the image around the mask.

    A square frame around the mask, three times as large as the mask, is resampled to 16 x 16 cells,
    so that position and size of the mask do not matter. Every cell has the visual channels, the
    masked share, and whether it lies inside the image. Three convolutions (3 x 3, GroupNorm, SiLU,
    Dropout) and the mean over the cells give the hidden layer, and every expert has a linear head
    of its own on it. All logits are near 0 at first.

    For models with the image to inpaint in their input, as FLUX Fill, the router reads this image
    only: its decision does not depend on noise, and is the same in all steps.

    Train it with the kinds of samples as labels, see `router_supervision_loss`. In training mode,
    the frames are mirrored, and their channels scaled, shifted and made noisy, at random.

    Args:
        num_experts: the number of experts; in `router_kwargs`, that of the config by default.
        input_dim: the width of the visual tokens without mask channels; 128 for FLUX Fill.
        channels: the first of the visual channels to read, and the one after the last; all by
            default. In `router_kwargs` for FLUX Fill [64, 128], for inpainting UNets [4, 8].
        patch_size: the side in latent pixels of what a token packs, channels first; in
            `router_kwargs` 2 for FLUX Fill.
        hidden_dim: the width of the hidden layer, a multiple of 4.
        dropout: the dropout probability after each convolution, in training.
        augmentation: the strength of the augmentation in training; 0 for none.
        num_layers: the number of adapted layers, for separate weights in each; "auto" in
            `router_kwargs`.

    Raises:
        ValueError: for arguments out of range, or `channels` that are no whole patches.

    Example:
        >>> from moe_lora import masks
        >>> inputs = RouterInputs(
        ...     torch.zeros(1, 16, 8), mask_info=masks.analyze(torch.ones(1, 1, 64, 64)),
        ...     grid_size=(4, 4),
        ... )
        >>> SurroundingsRouter(5, input_dim=8).eval()(inputs).weights.detach().round(decimals=1)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000, 0.2000]])
    """

    def __init__(
        self,
        num_experts: int,
        input_dim: int = 128,
        *,
        channels: Sequence[int] | None = None,
        patch_size: int = 1,
        hidden_dim: int = 96,
        dropout: float = 0.1,
        augmentation: float = 1.0,
        num_layers: int | None = None,
    ) -> None:
        super().__init__(input_dim, hidden_dim=hidden_dim, num_layers=num_layers)
        first, stop = (0, input_dim) if channels is None else channels
        if not 0 <= first < stop <= input_dim:
            raise ValueError(
                f"Expected `channels` to be [first, stop] within [0, {input_dim}], but got "
                f"{channels}."
            )
        if patch_size < 1 or (stop - first) % patch_size**2:
            raise ValueError(
                f"Expected `patch_size` to pack the {stop - first} channels, but got {patch_size}."
            )
        if hidden_dim < 4 or hidden_dim % 4:
            raise ValueError(f"Expected `hidden_dim` to be a multiple of 4, but got {hidden_dim}.")
        if augmentation < 0:
            raise ValueError(f"Expected `augmentation` to be at least 0, but got {augmentation}.")
        self.first, self.stop, self.patch_size = first, stop, patch_size
        self.augmentation = augmentation
        widths = [(stop - first) // patch_size**2 + 2, 32, 64, hidden_dim]
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.SiLU()]
            layers += [nn.Dropout(dropout), nn.AvgPool2d(2) if index < 2 else nn.Identity()]
        self.network = nn.Sequential(*layers)
        self.create_heads(num_experts)

    @classmethod
    def default_kwargs(cls, model: nn.Module, given: Collection[str] = ()) -> Mapping[str, Any]:
        """Return `input_dim` and, for inpainting models, `channels` and `patch_size`.

        Args:
            model: the model to adapt.
            given: names of the arguments from the caller; with `input_dim` the result is empty.

        Raises:
            ValueError: when the model has no `config.in_channels`.
        """
        kwargs = dict(super().default_kwargs(model, given))
        carried = family_of(model).carried_mask
        width = kwargs.get("input_dim")
        if carried is not None and width == carried.other_channels:
            kwargs["channels"] = [width // 2, width]
            kwargs["patch_size"] = 2 if carried.encoding == "flux_fill" else 1
        return {name: value for name, value in kwargs.items() if name not in given}

    def frames(self, inputs: RouterInputs) -> Tensor:
        """Return what the network sees, `(B, channels / patch_size² + 2, 16, 16)`.

        Args:
            inputs: the inputs of the call: hidden states `(B, T, input_dim)`, the analyzed mask and
                the grid size.

        Raises:
            ValueError: for tokens of another width than `input_dim`, or an unknown grid.
        """
        assert inputs.mask_info is not None
        rows, columns = inputs.require_grid_size()
        tokens, mask = inputs.hidden_states, inputs.mask_info.mask
        if tokens.shape[1:] != (rows * columns, self.input_dim):
            raise ValueError(
                f"Expected `hidden_states` to have shape (B, {rows * columns}, "
                f"input_dim={self.input_dim}), but got {tuple(tokens.shape)}."
            )
        side = self.patch_size
        patches = tokens[..., self.first : self.stop].unflatten(2, (-1, side, side))
        patches = patches.unflatten(1, (rows, columns)).permute(0, 3, 1, 4, 2, 5)
        planes = patches.flatten(4, 5).flatten(2, 3)
        grid = frame_coordinates(mask, CELLS * SAMPLES).to(planes.dtype)
        covered = to_tokens(mask, (rows * side, columns * side)).to(planes.dtype)
        covered = covered.unflatten(1, (1, rows * side, columns * side))
        seen = F.grid_sample(planes, grid, padding_mode="border", align_corners=False)
        masked = F.grid_sample(covered, grid, align_corners=False)
        within = (grid.abs() <= 1).all(-1).to(planes.dtype).unsqueeze(1)
        return F.avg_pool2d(torch.cat([seen, masked, within], dim=1), SAMPLES)

    def logits(self, inputs: RouterInputs) -> Tensor:
        """Return the logits of the experts, `(B, E)`, or `(B, num_layers, E)`.

        Args:
            inputs: the inputs of the call, see `frames`.

        Raises:
            ValueError: for tokens of another width than `input_dim`, or an unknown grid.
        """
        return self.frame_logits(self.frames(inputs))

    def frame_logits(self, frames: Tensor) -> Tensor:
        """Return the logits of the experts for frames, which a training can compute once.

        Args:
            frames: `(B, channels / patch_size² + 2, 16, 16)`, from `frames`.
        """
        frames = frames.to(next(self.network.parameters()).dtype)
        if self.training and self.augmentation:
            frames = augment_frames(frames, self.augmentation)
        hidden = self.network(frames)
        return self.head_logits(hidden.mean((2, 3)))
