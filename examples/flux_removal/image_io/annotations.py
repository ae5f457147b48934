"""Draw masks from COCO annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def decode(segmentation: Any, size: tuple[int, int]) -> NDArray[np.bool_]:
    """Draw one segmentation.

    Args:
        segmentation: an RLE, compressed or not, or polygons `[[x, y, x, y, ...], ...]`.
        size: width and height, for polygons, which do not say their own.

    Raises:
        ImportError: when pycocotools is missing.
    """
    try:
        from pycocotools import mask as coco
    except ImportError as error:
        raise ImportError(
            "COCO annotations need the package pycocotools: pip install pycocotools"
        ) from error
    if isinstance(segmentation, dict):
        rle = segmentation
        if isinstance(rle["counts"], list):
            rle = coco.frPyObjects(rle, *rle["size"])
    else:
        polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
        rle = coco.merge(coco.frPyObjects(polygons, size[1], size[0]))
    drawn: NDArray[np.bool_] = coco.decode(rle).astype(bool)
    return drawn


def annotations_for(
    data: dict[str, Any], image: str | None, size: tuple[int, int]
) -> tuple[list[Any], tuple[int, int]]:
    """Pick the annotations of one image from a COCO file, with the size that they are drawn in.

    Raises:
        ValueError: when the file describes several images, and none of that name.
    """
    images = data.get("images", [])
    found = [entry for entry in images if Path(entry["file_name"]).name == image]
    if not found and len(images) > 1:
        raise ValueError(f"it describes {len(images)} images, but none of them is {image}")
    entry = (found or images or [{}])[0]
    chosen = [a for a in data["annotations"] if a.get("image_id") == entry.get("id")]
    return chosen, (entry.get("width", size[0]), entry.get("height", size[1]))


def read_annotations(
    path: Path, size: tuple[int, int], *, image: str | None = None, label: int | None = None
) -> NDArray[np.bool_]:
    """Draw what a JSON file with COCO annotations covers.

    Args:
        path: of a COCO file, one annotation or a list of them, an RLE, or a list of polygons.
        size: width and height of the image.
        image: its file's name, to find it in a COCO file.
        label: a category; all of them when `None`.

    Returns:
        `(H, W)`, True where any of the annotations is.

    Raises:
        ImportError: when pycocotools is missing.
        ValueError: when the file holds none of these.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    found = [data]
    if isinstance(data, dict) and "annotations" in data:
        found, size = annotations_for(data, image, size)
    elif isinstance(data, list) and all(isinstance(entry, dict) for entry in data):
        found = data
    if label is not None:
        categories = [a.get("category_id") if isinstance(a, dict) else None for a in found]
        if None in categories:
            raise ValueError("its annotations have no categories, which a label would choose from")
        found = [a for a, category in zip(found, categories, strict=True) if category == label]
    mask = np.zeros(size[::-1], dtype=bool)
    if any(isinstance(a, dict) and not {"segmentation", "counts"} & set(a) for a in found):
        raise ValueError("it holds neither `segmentation` nor `counts`, as COCO annotations do")
    segments = [a.get("segmentation", a) if isinstance(a, dict) else a for a in found]
    drawn = [decode(segment, size) for segment in segments if segment]
    for one in drawn:
        if drawn[0].shape != one.shape:
            raise ValueError(f"its annotations are of {drawn[0].shape} and of {one.shape} pixels")
    return np.any(drawn, axis=0) if drawn else mask
