from __future__ import annotations

from pathlib import Path

import pytest

import app
from options.train_options import BUNDLED_MODEL


@pytest.fixture
def demo_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "outputs" / "demo" / "checkpoint"
    monkeypatch.setattr(app, "DEMO_CHECKPOINT", folder)
    return folder


def test_the_checkpoint_of_the_demonstration_is_the_default(demo_checkpoint: Path) -> None:
    args = app.parse([])
    assert args.checkpoint is None
    assert args.flux_fill_id == str(BUNDLED_MODEL)
    assert "make demo" in app.about(args)
    demo_checkpoint.mkdir(parents=True)
    args = app.parse([])
    assert args.checkpoint == demo_checkpoint
    assert "demo/checkpoint" in app.about(args)
    assert str(demo_checkpoint.parent) not in app.about(args)
    # It is no checkpoint of another base model.
    assert app.parse(["--flux_fill_id", "black-forest-labs/FLUX.1-Fill-dev"]).checkpoint is None
    assert app.parse(["--checkpoint", "mine"]).checkpoint == Path("mine")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", "0"], "--steps"),
        (["--steps", "51"], "--steps"),
        (["--redux_scale", "2"], "--flux_redux_id"),
        (["--most_megapixels", "0"], "--most_megapixels"),
        (["--most_megabytes", "-1"], "--most_megabytes"),
        (["--dtype", "int8"], "--dtype"),
    ],
)
def test_flags_that_cannot_be_honored_end_the_program(
    flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        app.parse(flags)
    assert named in capsys.readouterr().err
