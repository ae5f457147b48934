"""The scenes of `removal_kinds.py`: drawn, encoded once, and kept in files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxFillPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

from kinds import compose_kind, random_kind_scene
from photographs import Array, random_crop, resize
from scenes import MASK_KINDS, Scene, compose, cover

SIZE = 128
SHORT_SIDE = 420
PHOTOGRAPHS = (".jpg", ".jpeg", ".png")


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


def draw_on(photograph: Array, kind: str, index: int, seed: int) -> Scene:
    """Compose a scene of a kind on a photograph `(H, W, 3)`, in [0, 1]."""
    rng = np.random.default_rng((seed, index))
    mask_kind = MASK_KINDS[index // 3 % len(MASK_KINDS)]
    crops = [random_crop(rng, photograph, SIZE, min_std=0.03, min_mean=0.3) for _ in range(2)]
    if kind == "shadow":
        return compose(rng, *crops, mask_kind=mask_kind)
    return compose_kind(rng, kind, *crops, cover=lambda rng, alpha: cover(rng, alpha, mask_kind))


def draw_split(split: str, count: int, kinds: Sequence[str], seed: int) -> list[Scene]:
    """Compose scenes on the demonstration's photographs; the kinds take turns."""
    return [
        random_kind_scene(
            np.random.default_rng((seed, index)),
            split,
            SIZE,
            kind=kinds[index % len(kinds)],
            mask_kind=MASK_KINDS[index // len(kinds) % len(MASK_KINDS)],
        )
        for index in range(count)
    ]


def read_photographs(folder: Path) -> list[Array]:
    """Read the photographs of a folder and its subfolders, with a short side of 420 pixels.

    Raises:
        FileNotFoundError: when there are none.
    """
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in PHOTOGRAPHS):
        with Image.open(path) as file:
            image = np.asarray(file.convert("RGB"), dtype=np.float32) / np.float32(255)
        scale = SHORT_SIDE / min(image.shape[:2])
        height, width = (round(side * scale) for side in image.shape[:2])
        found.append(resize(image, height, width) if scale < 1 else image)
    if not found:
        raise FileNotFoundError(f"Expected photographs in {folder}, but found none.")
    return found


def draw_folder(folder: Path, count: int, kinds: Sequence[str], seed: int) -> list[Scene]:
    """Compose scenes on the photographs of a folder, which take turns after all kinds."""
    photographs = read_photographs(folder)
    return [
        draw_on(
            photographs[index // len(kinds) % len(photographs)],
            kinds[index % len(kinds)],
            index,
            seed,
        )
        for index in range(count)
    ]


@torch.no_grad()
def encode(scenes: Sequence[Scene], vae: AutoencoderKL, kinds: Sequence[str]) -> Scenes:
    """Encode scenes of the kinds, which take turns."""

    def images(values: Sequence[Array]) -> Tensor:
        stacked = torch.from_numpy(np.stack(values)).permute(0, 3, 1, 2)
        return (stacked * 255).round().to(torch.uint8)

    def latents(image: Tensor) -> Tensor:
        mean = torch.cat([vae.encode(part).latent_dist.mean for part in image.split(16)])
        return pack((mean - vae.config.shift_factor) * vae.config.scaling_factor)

    def pack(planes: Tensor) -> Tensor:
        packed: Tensor = FluxFillPipeline._pack_latents(planes, *planes.shape)
        return packed

    source, result = (images([getattr(s, n) for s in scenes]) for n in ("src", "result"))
    mask = torch.from_numpy(np.stack([scene.mask for scene in scenes]))[:, None]
    masked = (source / 127.5 - 1) * (1 - mask)
    packed_mask = pack(torch.nn.functional.pixel_unshuffle(mask, 8))
    return Scenes(
        source=source,
        mask=mask.to(torch.uint8),
        result=result,
        target=latents(result / 127.5 - 1),
        condition=torch.cat([latents(masked), packed_mask], dim=-1),
        kind=torch.arange(len(scenes)) % len(kinds),
    )


def kept(
    path: Path, draw: Callable[[], Sequence[Scene]], vae: AutoencoderKL, kinds: Sequence[str]
) -> Scenes:
    """Read scenes from their file, or draw and encode them and write it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        found = encode(draw(), vae, kinds)
        save_file({name: value.contiguous() for name, value in vars(found).items()}, scratch)
        scratch.replace(path)
    return Scenes(**load_file(path))
