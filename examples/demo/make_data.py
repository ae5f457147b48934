"""Write removal triplets made of real photographs as image files.

python make_data.py --output_dir data                                    bundled photographs
python make_data.py --output_dir data --photographs DIR --objects DIR    your own
python make_data.py --output_dir data --kinds shadow glow                several kinds of removal

The layout is OUT/{train,test}/{src,mask,result,ref}/NNNN.png, beside a metadata.jsonl for each
split and, with --kinds, a manifest.jsonl with the kind of each scene. Train and test use different
photographs. The same seeds give the same files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from kinds import KINDS, random_kind_scene
from mask_shapes import OWN_MASK_KINDS
from own_scenes import OwnScenes
from photographs import Array, Rng
from scenes import MASK_KINDS, Scene, random_scene

SEEDS = {"train": 11, "test": 12}
STAMP = "complete.json"
"""The file that says what a folder holds; only folders with it are changed."""

FOLDERS = ("src", "mask", "result", "ref")

MANIFEST = "manifest.jsonl"


def save_image(path: Path, array: Array) -> None:
    """Write `(H, W)` or `(H, W, 3)`, in [0, 1], as a PNG file."""
    image = Image.fromarray(np.round(array * 255).astype(np.uint8))
    image.save(path, compress_level=1)


def describe(scene: Scene, stem: str) -> dict[str, str | float]:
    """Return what the metadata says of a scene."""
    return {
        "stem": stem,
        "photograph": scene.photograph,
        "object": scene.object_kind,
        "mask": scene.mask_kind,
        "area": round(float(scene.mask.mean()), 4),
    }


def draw_scene(
    rng: Rng, split: str, size: int, own: OwnScenes | None, mask_kind: str, kind: str | None
) -> Scene:
    """Draw a scene of a kind, or one as the demonstration has it."""
    if own:
        return own.draw(rng, split, size, mask_kind, kind)
    if kind:
        return random_kind_scene(rng, split, size, kind=kind, mask_kind=mask_kind)
    return random_scene(rng, split, size, mask_kind=mask_kind)


def write_scene(
    folder: Path,
    split: str,
    size: int,
    mask_kinds: Sequence[str],
    kinds: Sequence[str | None],
    own: OwnScenes | None,
    index: int,
) -> dict[str, str | float]:
    """Write the files of one scene, which depends on nothing but its index; return its metadata."""
    rng = np.random.default_rng((SEEDS[split], index))
    kind = kinds[index % len(kinds)]
    mask_kind = mask_kinds[index // len(kinds) % len(mask_kinds)]
    scene = draw_scene(rng, split, size, own, mask_kind, kind)
    stem = f"{index:04d}"
    for name in FOLDERS:
        save_image(folder / name / f"{stem}.png", getattr(scene, name))
    return describe(scene, stem) | ({"kind": kind} if kind else {})


def manifest_line(entry: dict[str, str | float]) -> dict[str, str | float]:
    """Return the line of a scene in the manifest."""
    files = {name: f"{name}/{entry['stem']}.png" for name in FOLDERS}
    return {"name": entry["stem"], **files, "kind": entry["kind"]}


def write_split(
    folder: Path,
    split: str,
    count: int,
    size: int,
    *,
    before: int,
    mask_kinds: Sequence[str] = MASK_KINDS,
    kinds: Sequence[str] | None = None,
    own: OwnScenes | None = None,
) -> None:
    """Write `count` scenes of a split, which had `before`.

    The kinds of removal take turns, and after each turn of these those of masks.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count, before):
            (folder / name / f"{index:04d}.png").unlink(missing_ok=True)
    write = partial(write_scene, folder, split, size, mask_kinds, kinds or [None], own)
    with ThreadPoolExecutor() as threads:
        entries = list(threads.map(write, range(count)))
    write_lines(folder / "metadata.jsonl", entries)
    if kinds:
        write_lines(folder / MANIFEST, [manifest_line(entry) for entry in entries])


def write_lines(path: Path, entries: Sequence[dict[str, str | float]]) -> None:
    """Write a JSON object a line."""
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")


def read_stamp(output: Path) -> dict[str, Any] | None:
    """Return what was written into a folder before; None for one that is empty or missing.

    Raises:
        FileExistsError: when the folder holds anything that was not written here.
    """
    try:
        found = json.loads((output / STAMP).read_text(encoding="utf-8"))
        if {"train", "test", "size", "seeds"} <= set(found):
            return dict(found)
    except FileNotFoundError:
        if not output.is_dir() and not output.exists():
            return None
        if output.is_dir() and not any(output.iterdir()):
            return None
    except (ValueError, TypeError, NotADirectoryError):
        pass
    raise FileExistsError(
        f"Expected {output} to be a new or empty folder, or one that make_data.py wrote, but it "
        "holds other files. Name another --output_dir."
    )


def make_data(
    output: Path,
    *,
    train_count: int = 480,
    test_count: int = 48,
    size: int = 128,
    own: OwnScenes | None = None,
    mask_kinds: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
) -> None:
    """Write both splits, unless the folder already holds exactly them.

    Args:
        output: receives `train` and `test`.
        train_count: scenes for training.
        test_count: scenes for testing.
        size: side of the images in pixels.
        own: photographs and objects to compose; the bundled ones by default.
        mask_kinds: those of `OWN_MASK_KINDS` with `own`, those of `MASK_KINDS` without by default.
        kinds: of removal, of `KINDS`; as many scenes of each, and a manifest that names them.

    Raises:
        FileExistsError: when the folder holds anything that was not written here.
    """
    wanted: dict[str, Any] = {"train": train_count, "test": test_count, "size": size}
    wanted["seeds"] = SEEDS
    if own is not None:
        wanted["files"] = own.stamp()
    if mask_kinds is not None:
        wanted["masks"] = list(mask_kinds)
    if kinds is not None:
        wanted["kinds"] = list(kinds)
    settings: dict[str, Any] = {
        "own": own,
        "mask_kinds": mask_kinds or (OWN_MASK_KINDS if own else MASK_KINDS),
        "kinds": kinds,
    }
    found = read_stamp(output) or {"train": 0, "test": 0}
    if found == wanted:
        return
    output.mkdir(parents=True, exist_ok=True)
    # Until all is written, the stamp tells whose folder it is, and all files that may be there.
    most = {split: max(wanted[split], found[split]) for split in ("train", "test")}
    (output / STAMP).write_text(json.dumps(wanted | most | {"complete": False}))
    write_split(output / "train", "train", train_count, size, before=found["train"], **settings)
    write_split(output / "test", "test", test_count, size, before=found["test"], **settings)
    (output / STAMP).write_text(json.dumps(wanted))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the data that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--train_count", type=int, default=480)
    parser.add_argument("--test_count", type=int, default=48)
    parser.add_argument("--size", type=int, default=128, help="side in pixels, a multiple of 16")
    parser.add_argument("--photographs", type=Path, help="a folder of your own, without objects")
    parser.add_argument(
        "--objects", type=Path, help="a folder of cut-outs with transparency, to put into them"
    )
    parser.add_argument(
        "--mask_kinds",
        nargs="+",
        choices=sorted({*OWN_MASK_KINDS, *MASK_KINDS}),
        help=f"{', '.join(OWN_MASK_KINDS)} by default; these take turns",
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        help="kinds of removal, which take turns; a manifest names the kind of each scene",
    )
    args = parser.parse_args(arguments)
    if (args.photographs is None) != (args.objects is None):
        parser.error("--photographs and --objects need each other")
    if args.mask_kinds and args.photographs is None:
        parser.error("--mask_kinds needs --photographs and --objects")
    if args.size < 32 or args.size % 16:
        parser.error(f"Expected --size to be a multiple of 16 from 32 up, but got {args.size}.")
    own = OwnScenes(args.photographs, args.objects) if args.photographs else None
    make_data(
        args.output_dir,
        train_count=args.train_count,
        test_count=args.test_count,
        size=args.size,
        own=own,
        mask_kinds=args.mask_kinds,
        kinds=args.kinds,
    )


if __name__ == "__main__":
    main()
