"""What one visitor works on: a photograph, its mask and the results."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from image_io.mask_values import Mask
from image_session.painted_mask import empty_mask, grown, mask_from_file, repainted
from image_session.photo import Photo, open_photo, write_mask, write_result
from image_session.removal_session import (
    ExportFormat,
    OnProgress,
    Removal,
    RemovalSession,
    RemovalSettings,
)

Layers = Sequence[Image.Image]


def no_progress(share: float, text: str) -> None:
    """Tell nobody."""


@dataclass
class Visit:
    """The work of one visitor; nothing of it is shared with another.

    Attributes:
        photo: what was loaded last; `None` before.
        mask: `(H, W)`, what shall be removed, without the strokes that are still in the editor.
        used_mask: `(H, W)`, the mask of the results.
        removals: the results of the last request.
        chosen: index of the one that is shown and downloaded.
        previous: the image that was shown before the last request.
        folder: holds the files of the photograph.
        retired: holds those of the photograph before, which a page may still be loading.
    """

    photo: Photo | None = None
    mask: Mask | None = None
    used_mask: Mask | None = None
    removals: list[Removal] = field(default_factory=list)
    chosen: int = 0
    previous: Image.Image | None = None
    folder: Path | None = None
    retired: Path | None = None

    @property
    def loaded(self) -> Photo:
        """The photograph.

        Raises:
            ValueError: when there is none.
        """
        if self.photo is None:
            raise ValueError("Expected a photograph, but none is loaded yet.")
        return self.photo

    @property
    def shown(self) -> Removal:
        """The chosen result.

        Raises:
            ValueError: when there is none.
        """
        if not self.removals:
            raise ValueError("Expected a result, but nothing was removed yet.")
        return self.removals[self.chosen]

    @property
    def current_mask(self) -> Mask:
        """The mask of the photograph, `(H, W)`; it covers nothing at first."""
        photo = self.loaded
        return empty_mask(photo) if self.mask is None else self.mask

    @property
    def source(self) -> Image.Image:
        """What the results were made of, mode RGB."""
        mask = self.current_mask if self.used_mask is None else self.used_mask
        return self.loaded.source_for(mask).rgb

    def open(self, path: Path, *, most_megapixels: float, mask: Path | None = None) -> None:
        """Load a photograph; the work on the last one is dropped.

        Args:
            path: of the photograph.
            most_megapixels: see `open_photo`.
            mask: a file with its mask; by default what is transparent is the mask.
        """
        photo = open_photo(path, most_megapixels=most_megapixels)
        found = photo.holes if mask is None else mask_from_file(mask, photo)
        self._retire_folder()
        self.photo, self.mask, self.used_mask = photo, found, None
        self.removals, self.chosen, self.previous = [], 0, None

    def load_mask(self, path: Path) -> None:
        """Replace the mask by that of a file."""
        self.mask = mask_from_file(path, self.loaded)

    def grow_mask(self, layers: Layers, pixels: int) -> None:
        """Extend the mask by so many pixels of the photograph."""
        self.mask = grown(repainted(self.current_mask, layers), pixels)

    def invert_mask(self, layers: Layers) -> None:
        """Swap what is removed and what is kept."""
        self.mask = ~repainted(self.current_mask, layers)

    def clear_mask(self) -> None:
        """Remove nothing."""
        self.mask = None

    def remove(
        self,
        session: RemovalSession,
        layers: Layers,
        settings: RemovalSettings,
        on_progress: OnProgress = no_progress,
    ) -> None:
        """Remove what the editor shows as painted; the strokes stay in the editor."""
        self._run(session, repainted(self.current_mask, layers), settings, on_progress)

    def redraw(
        self,
        session: RemovalSession,
        on_progress: OnProgress = no_progress,
        *,
        weights: tuple[float, ...] | None = None,
        without: str | None = None,
    ) -> None:
        """Repeat the last request with other weights, or without an expert.

        Raises:
            ValueError: when there was no request, or the weights are invalid.
        """
        settings = dataclasses.replace(self.shown.settings, weights=weights, without=without)
        assert self.used_mask is not None
        self._run(session, self.used_mask, settings, on_progress)

    def _run(
        self,
        session: RemovalSession,
        mask: Mask,
        settings: RemovalSettings,
        on_progress: OnProgress,
    ) -> None:
        image = self.loaded.source_for(mask).rgb
        drawn = Image.fromarray(mask.astype(np.uint8) * 255)
        found = session.remove(image, drawn, settings, on_progress)
        self.previous = self.shown.image if self.removals else None
        self.removals, self.used_mask, self.chosen = found, mask, 0

    def choose(self, index: int) -> None:
        """Show another of the results.

        Raises:
            ValueError: when there is none of this index.
        """
        if not 0 <= index < len(self.removals):
            raise ValueError(f"Expected one of {len(self.removals)} results, but got {index}.")
        self.chosen = index

    def write_shown(self, root: Path) -> tuple[Path, Path]:
        """Write the chosen result as the photograph was stored, and the mask.

        Args:
            root: receives a folder of the visit.

        Returns:
            Both files.
        """
        removal, folder = self.shown, self.folder_in(root)
        assert self.used_mask is not None
        return (
            write_result(removal.image, self.loaded, self.used_mask, folder),
            write_mask(self.used_mask, self.loaded, folder),
        )

    def export(self, session: RemovalSession, root: Path, format: ExportFormat) -> Path:
        """Write the mixture of the chosen result as one plain LoRA file.

        Args:
            session: whose experts.
            root: receives a folder of the visit.
            format: of the file.

        Raises:
            ValueError: when there is no result, or it had no experts.
        """
        trace = self.shown.trace
        if trace is None:
            raise ValueError("Expected a checkpoint with experts to export, but none is loaded.")
        path = self.folder_in(root) / f"{self.loaded.name}_mixture_{format}.safetensors"
        return session.export(trace.mean, path, format=format).path

    def picture(self, image: Image.Image, root: Path) -> Path:
        """Write an image for the page, under a name that no other has.

        Pages read a file while the next one is written, so that none is written twice.
        """
        handle, name = tempfile.mkstemp(suffix=".png", dir=self.folder_in(root))
        with open(handle, "wb") as file:
            image.save(file, "PNG", compress_level=1)
        return Path(name)

    def folder_in(self, root: Path) -> Path:
        """Return the folder of the visit, which is made when it is first needed."""
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="visit_", dir=root))
        return self.folder

    def _retire_folder(self) -> None:
        if self.folder is not None:
            delete(self.retired)
            self.retired, self.folder = self.folder, None

    def close(self) -> None:
        """Delete the files of the visit."""
        delete(self.folder)
        delete(self.retired)
        self.folder = self.retired = None


def delete(folder: Path | None) -> None:
    """Delete a folder, if there is one."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
