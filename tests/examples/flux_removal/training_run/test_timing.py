from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from options.parsing import parse_options
from training_run import timing
from training_run.timing import StepClock

Arguments = Callable[..., list[str]]


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time, which goes on only when a test says so."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_the_first_step_and_what_happens_between_steps_do_not_count(seconds: list[float]) -> None:
    clock, told = StepClock(torch.device("cpu"), steps=4), []
    for duration in (100.0, 1.0, 2.0, 3.0, 7.0):
        with clock.measuring():
            seconds[0] += duration
        told.append(clock.count())
        seconds[0] += 50.0  # a validation
    assert told == [None, None, None, 2.0, None]


def test_a_step_may_have_several_batches(seconds: list[float]) -> None:
    clock = StepClock(torch.device("cpu"), steps=2)
    for duration in (5.0, 1.5):
        for _ in range(2):
            with clock.measuring():
                seconds[0] += duration
        found = clock.count()
    assert found == 3.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{}, {"adapter": "lora"}, {"ema_decay": 0.9}],
    ids=["mixture", "plain lora", "averaged"],
)
def test_the_log_tells_time_and_disk_after_ten_steps(
    changed: dict[str, Any], arguments: Arguments, tmp_path: Path
) -> None:
    folder = train.train(
        parse_options(arguments(**changed, max_train_steps=12, checkpointing_steps=5, lora_r=64))
    )
    log = (tmp_path / "logs" / "training.log").read_text()
    (line,) = [line for line in log.splitlines() if "Time: " in line]
    found = re.search(
        r"Time: (\d+\.\d\d) s per step, 2 steps left in about .* "
        r"Disk: (\d\.\d{3}) GiB per checkpoint, 2 to come\.",
        line,
    )
    assert found is not None
    assert log.index("Time: ") > log.index("Step 9/12")
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert float(found[2]) == pytest.approx(size / 2**30, abs=0.0011)
    assert float(found[2]) > 0


@pytest.mark.slow
def test_a_shorter_run_tells_nothing(arguments: Arguments, tmp_path: Path) -> None:
    train.train(parse_options(arguments(max_train_steps=3)))
    assert "Time: " not in (tmp_path / "logs" / "training.log").read_text()
