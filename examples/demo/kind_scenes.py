"""Draw scenes of several kinds of removal into one file, on bundled or other photographs.

python kind_scenes.py --output scenes.safetensors --count 72 --kinds shadow glow --split test
python kind_scenes.py --output scenes.safetensors --count 186 --photographs DIR

The file has `source` and `result` `(N, 3, S, S)` and `mask` `(N, 1, S, S)` in 0-255, and `kind`
`(N,)`, the index of the kind, or with `--label mask_kind` that of the kind of mask. Kinds take
turns, and after each turn of them the kinds of masks, and the photographs of the folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from kinds import KINDS, compose_kind, random_kind_scene
from own_scenes import list_images, load_photograph
from photographs import Array, random_crop, resize
from scenes import MASK_KINDS, Scene, compose, cover

SHORT_SIDE = 420
"""Photographs of a folder are reduced to this short side."""


def read_photographs(folder: Path) -> list[Array]:
    """Read the photographs of a folder and its subfolders, each `(H, W, 3)`, in [0, 1].

    Raises:
        FileNotFoundError: when there are none.
    """
    found = []
    for path in list_images(folder):
        image = load_photograph(path)
        scale = SHORT_SIDE / min(image.shape[:2])
        height, width = (round(side * scale) for side in image.shape[:2])
        found.append(resize(image, height, width) if scale < 1 else image)
    return found


def draw_on(photograph: Array, kind: str, mask_kind: str, rng: np.random.Generator) -> Scene:
    """Compose a scene of a kind, 128 x 128, on a photograph `(H, W, 3)`, in [0, 1]."""
    crops = [random_crop(rng, photograph, 128, min_std=0.03, min_mean=0.3) for _ in range(2)]
    if kind == "shadow":
        return compose(rng, crops[0], crops[1], mask_kind=mask_kind)
    draw_mask = partial(cover, kind=mask_kind)
    return compose_kind(rng, kind, crops[0], crops[1], cover=draw_mask, mask_kind=mask_kind)


def draw(
    count: int, kinds: Sequence[str], split: str, photographs: Path | None, seed: int
) -> list[Scene]:
    """Compose scenes, each of which depends on the seed and its index alone."""
    folder = read_photographs(photographs) if photographs else []
    found = []
    for index in range(count):
        rng, kind = np.random.default_rng((seed, index)), kinds[index % len(kinds)]
        mask_kind = MASK_KINDS[index // len(kinds) % len(MASK_KINDS)]
        if folder:
            photograph = folder[index // len(kinds) % len(folder)]
            found.append(draw_on(photograph, kind, mask_kind, rng))
        else:
            found.append(random_kind_scene(rng, split, kind=kind, mask_kind=mask_kind))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="a safetensors file")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--label", choices=("kind", "mask_kind"), default="kind", help="what `kind` numbers"
    )
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--photographs", type=Path, help="a folder, in place of the bundled ones")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    scenes = draw(args.count, args.kinds, args.split, args.photographs, args.seed)

    def images(name: str) -> torch.Tensor:
        arrays = [np.atleast_3d(getattr(scene, name)) for scene in scenes]
        stacked = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        return (stacked * 255).round().to(torch.uint8).contiguous()

    tensors = {"source": images("src"), "result": images("result"), "mask": images("mask")}
    names = args.kinds if args.label == "kind" else MASK_KINDS
    labels = [names.index(getattr(scene, args.label)) for scene in scenes]
    tensors["kind"] = torch.tensor(labels)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.output)


if __name__ == "__main__":
    main()
