"""Draw a contact sheet of the kinds of removal, one row a kind.

python kind_sheet.py --output kinds.png
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kinds import KINDS, random_kind_scene
from photographs import Array
from scenes import MASK_KINDS, Scene

sys.path.insert(0, str(Path(__file__).parents[1] / "flux_removal"))

from reporting.contact_sheet import contact_sheet, show_mask


def to_tensor(image: Array) -> Tensor:
    """Turn an image `(H, W, 3)` or a map `(H, W)` into `(C, H, W)`."""
    return torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)


def columns(scene: Scene, number: int) -> dict[str, Tensor]:
    """Return source, mask and target of a scene by the titles of their columns."""
    src, mask = to_tensor(scene.src), to_tensor(scene.mask)
    return {
        f"source {number}": src,
        f"mask {number}": show_mask(src, mask),
        f"target {number}": to_tensor(scene.result),
    }


def draw_kinds(path: Path, *, split: str = "test", size: int = 128, count: int = 3) -> None:
    """Write a sheet with `count` scenes of every kind.

    Args:
        path: of an image file.
        split: of the photographs, `"train"` or `"test"`.
        size: side of the scenes in pixels.
        count: scenes per row.
    """
    rows = []
    for kind in KINDS:
        row: dict[str, Tensor] = {}
        for index in range(count):
            rng, mask_kind = np.random.default_rng((7, index)), MASK_KINDS[index % len(MASK_KINDS)]
            scene = random_kind_scene(rng, split, size, kind=kind, mask_kind=mask_kind)
            row |= columns(scene, index + 1)
        rows.append(row)
    contact_sheet(rows, path, scale=1, labels=KINDS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="an image file")
    parser.add_argument("--split", choices=("train", "test"), default="test", help="photographs")
    parser.add_argument("--size", type=int, default=128, help="side of the scenes in pixels")
    parser.add_argument("--count", type=int, default=3, help="scenes per row")
    args = parser.parse_args(arguments)
    draw_kinds(args.output, split=args.split, size=args.size, count=args.count)


if __name__ == "__main__":
    main()
