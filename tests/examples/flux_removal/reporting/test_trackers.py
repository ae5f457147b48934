from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType, ProjectConfiguration
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from options.sharing_options import TRACKERS
from reporting import trackers
from reporting.trackers import FigureWriter, check_tracker, log_image, start_trackers


class Recorder(GeneralTracker):
    """A tracker that keeps what it gets."""

    requires_logging_directory = False

    def __init__(self, name: str = "wandb") -> None:
        self.name = name
        self.got: list[tuple[dict[str, Any], int | None]] = []
        self.config: dict[str, Any] = {}

    @property
    def tracker(self) -> Recorder:
        return self

    def start(self) -> None:
        pass

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.got.append((values, step))

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self.got.append((values, step))

    def finish(self) -> None:
        pass


class Scalars(Recorder):
    """A tracker of scalars alone."""

    log_images: Any = property()  # which raises AttributeError


def started(*chosen: Any, folder: Path | None = None) -> Accelerator:
    settings = ProjectConfiguration(logging_dir=None if folder is None else str(folder))
    accelerator = Accelerator(cpu=True, log_with=list(chosen), project_config=settings)
    start_trackers(accelerator, "run", {"lora_r": 4})
    return accelerator


IMAGE = Image.new("RGB", (6, 4), (255, 0, 0))


def test_tensorboard_receives_images(tmp_path: Path) -> None:
    accelerator = started("tensorboard", folder=tmp_path)
    log_image(accelerator, "a/b", IMAGE, 3)
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (event,) = events.Images("a/b")
    assert (event.step, event.width, event.height) == (3, 6, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wandb", (1, 4, 6, 3)),
        ("swanlab", (1, 4, 6, 3)),
        ("aim", (4, 6, 3)),
        ("clearml", (4, 6, 3)),
    ],
)
def test_every_tracker_gets_images_as_it_takes_them(name: str, shape: tuple[int, ...]) -> None:
    tracker = Recorder(name)
    log_image(started(tracker), "a", IMAGE, 5)
    ((values, step),) = tracker.got
    assert step == 5
    assert np.asarray(values["a"]).shape == shape
    assert np.asarray(values["a"]).reshape(-1, 3).max(0).tolist() == [255, 0, 0]
    assert isinstance(values["a"], list) == (len(shape) == 4)


def test_trackio_gets_images_of_its_own_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(Image=lambda pixels: ("image", pixels.shape))
    monkeypatch.setitem(sys.modules, "trackio", module)
    tracker = Scalars("trackio")
    log_image(started(tracker), "a", IMAGE, 5)
    assert tracker.got == [({"a": ("image", (4, 6, 3))}, 5)]


def test_a_tracker_of_scalars_gets_no_image() -> None:
    tracker = Scalars("mlflow")
    log_image(started(tracker), "a", IMAGE, 5)
    assert tracker.got == []


def test_figures_are_sent_as_images() -> None:
    tracker = Recorder()
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1])
    FigureWriter(started(tracker)).add_figure("f", figure, 7)
    ((values, step),) = tracker.got
    assert (step, values["f"][0].shape) == (7, (50, 100, 3))


def test_options_are_stored_but_in_tensorboard(tmp_path: Path) -> None:
    tracker = Recorder()
    accelerator = started(tracker, "tensorboard", folder=tmp_path)
    assert tracker.config == {"lora_r": 4}
    accelerator.end_training()
    assert not [path for path in (tmp_path / "run").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("name", "package"), [("wandb", "wandb"), ("comet_ml", "comet-ml"), ("all", "tensorboard")]
)
def test_a_missing_package_raises(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(ModuleNotFoundError, match=f"`report_to` {name} .*pip install {package}`"):
        check_tracker(name)


def test_what_is_installed_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    for name in ("tensorboard", "all", "none"):
        check_tracker(name)
    with pytest.raises(ModuleNotFoundError):
        check_tracker("wandb")


def test_all_trackers_of_accelerate_can_be_chosen() -> None:
    assert set(TRACKERS) == {str(kind.value) for kind in LoggerType} | {"none"}
