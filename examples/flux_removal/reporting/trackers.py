"""Trackers of accelerate: which are installed, and how each takes images."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = {"comet_ml": "comet-ml"}
"""Packages of trackers that have another name than the tracker."""

SINGLE = ("aim", "clearml")
"""Trackers that take one image; others take a list."""


def check_tracker(name: str) -> None:
    """Raise unless the package of a tracker is installed.

    Args:
        name: a value of `--report_to`.

    Raises:
        ModuleNotFoundError: when it is not, or when "all" finds none.
    """
    known = {str(kind.value) for kind in get_available_trackers()}
    if name == "none" or name in known or (name == "all" and known):
        return
    package = "tensorboard" if name == "all" else PACKAGES.get(name, name)
    raise ModuleNotFoundError(
        f"Expected the package of `report_to` {name} to be installed, but it is not. Run "
        f"`pip install {package}`, or pass --report_to none."
    )


def start_trackers(accelerator: Accelerator, project: str, config: dict[str, Any]) -> None:
    """Start the trackers of a run on the main process, and store its options in them.

    TensorBoard gets no options: it would show them as a run of its own.
    """
    if not accelerator.is_main_process:
        return
    accelerator.init_trackers(project)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":
            tracker.store_init_configuration(config)


def takes_images(tracker: GeneralTracker) -> bool:
    """Tell whether a tracker shows images."""
    return hasattr(tracker, "log_images") or tracker.name == "trackio"


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Send an image to all trackers that show images; the main process has them."""
    pixels = np.asarray(image.convert("RGB"))
    for tracker in filter(takes_images, accelerator.trackers):
        if tracker.name == "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":
            import trackio  # accelerate's tracker has no method for images

            tracker.log({name: trackio.Image(pixels)}, step=step)
        elif tracker.name in SINGLE:
            tracker.log_images({name: pixels}, step=step)
        else:
            tracker.log_images({name: [pixels]}, step=step)


class FigureWriter:
    """Send figures of matplotlib to all trackers that show images.

    Args:
        accelerator: the run's.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def add_figure(self, name: str, figure: Figure, step: int) -> None:
        """Draw a figure."""
        drawn = BytesIO()
        figure.savefig(drawn, format="png")
        log_image(self.accelerator, name, Image.open(drawn), step)
