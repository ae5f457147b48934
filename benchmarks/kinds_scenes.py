"""The scenes of `removal_kinds.py`, encoded once and kept in files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

import kind_scenes


@dataclass
class Scenes:
    """Hold scenes and their latents.

    Attributes:
        source, result: `(N, 3, H, W)`, in 0-255.
        mask: `(N, 1, H, W)`, of zeros and ones.
        target: packed latents of the result, `(N, T, 64)`.
        condition: packed latents of the masked source, and the packed mask, `(N, T, 320)`.
        kind: `(N,)`, the index of the kind.
    """

    source: Tensor
    mask: Tensor
    result: Tensor
    target: Tensor
    condition: Tensor
    kind: Tensor

    def __len__(self) -> int:
        return len(self.kind)

    def of_kinds(self, kinds: Sequence[int]) -> Scenes:
        """Return the scenes of some kinds."""
        chosen = torch.isin(self.kind, torch.tensor(kinds))
        return Scenes(**{name: value[chosen] for name, value in vars(self).items()})

    def first(self, count: int) -> Scenes:
        """Return the first scenes."""
        return Scenes(**{name: value[:count] for name, value in vars(self).items()})


@torch.no_grad()
def encode(drawn: dict[str, Tensor], vae: AutoencoderKL) -> Scenes:
    """Encode what `kind_scenes.py` draws."""

    def latents(image: Tensor) -> Tensor:
        mean = torch.cat([vae.encode(part).latent_dist.mean for part in image.split(16)])
        return pack((mean - vae.config.shift_factor) * vae.config.scaling_factor)

    def pack(planes: Tensor) -> Tensor:
        packed: Tensor = FluxFillPipeline._pack_latents(planes, *planes.shape)
        return packed

    mask = drawn["mask"] / 255
    masked = (drawn["source"] / 127.5 - 1) * (1 - mask)
    packed_mask = pack(torch.nn.functional.pixel_unshuffle(mask, 8))
    return Scenes(
        source=drawn["source"],
        mask=mask.to(torch.uint8),
        result=drawn["result"],
        target=latents(drawn["result"] / 127.5 - 1),
        condition=torch.cat([latents(masked), packed_mask], dim=-1),
        kind=drawn["kind"],
    )


def kept(path: Path, vae: AutoencoderKL, flags: Sequence[str]) -> Scenes:
    """Read scenes from their file, or draw and encode them and write it.

    Args:
        path: of the file.
        vae: the autoencoder.
        flags: of `kind_scenes.py`.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        kind_scenes.main(["--output", str(scratch), *flags])
        found = encode(load_file(scratch), vae)
        save_file({name: value.contiguous() for name, value in vars(found).items()}, scratch)
        scratch.replace(path)
    return Scenes(**load_file(path))
