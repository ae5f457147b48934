"""Photographs with masks to begin with: those of the demonstration's test set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from make_data import make_data

COUNT, SIDE = 6, 256


@dataclass(frozen=True)
class SamplePhoto:
    """A photograph with an object, and the mask of the object."""

    photo: Path
    mask: Path


def sample_photos(folder: Path, *, count: int = COUNT, side: int = SIDE) -> list[SamplePhoto]:
    """Write photographs with objects that no training has seen; nothing is downloaded.

    Args:
        folder: receives the files.
        count: how many.
        side: in pixels.
    """
    make_data(folder, train_count=0, test_count=count, size=side)
    photos = sorted((folder / "test" / "src").iterdir())
    return [SamplePhoto(photo, folder / "test" / "mask" / photo.name) for photo in photos]
