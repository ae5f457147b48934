"""The report for GPUs keeps what it has, says what is missing, and compares with its targets."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)


def module(name: str) -> Any:
    return importlib.import_module(name)


def section(name: str, code: str, figures: Path | None = None, minutes: float = 1) -> Any:
    command = (sys.executable, "-c", code)
    return module("gpu_sections").Section(name, f"title of {name}", command, minutes, figures)


def report() -> dict[str, Any]:
    return {"machine": "a machine", "device": "cuda", "small": False, "sections": []}


def ran(parts: list[Any], folder: Path, minutes: float = 1) -> dict[str, Any]:
    module("gpu").run_all(parts, report(), folder, minutes)
    found: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return found


@pytest.mark.slow
def test_every_outcome_is_told_and_leaves_the_others(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    parts = [
        section("good", f"print('| a table |'); open({str(figures)!r}, 'w').write('[3]')", figures),
        section("broken", "import sys; print('half'); sys.exit('no memory left')"),
        section("long", "import time; print('begun', flush=True); time.sleep(60)", minutes=1 / 30),
        section("last", "print('here')"),
    ]
    good, broken, long, last = ran(parts, tmp_path)["sections"]
    assert (good["status"], good["printed"], good["figures"]) == ("done", "| a table |\n", [3])
    assert (broken["status"], broken["why"]) == ("failed", "exit status 1")
    assert (broken["printed"], broken["errors"]) == ("half\n", "no memory left\n")
    assert (long["status"], long["why"], long["printed"]) == ("stopped", "after 2 s", "begun\n")
    assert last["printed"] == "here\n"
    page = (tmp_path / "gpu.md").read_text()
    assert "| title of long | stopped after 2 s | 2 |" in page
    assert "no memory left" in page


@pytest.mark.slow
def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    parts = [section("first", "import time; time.sleep(60)"), section("second", "")]
    first, second = ran(parts, tmp_path, minutes=1 / 60)["sections"]
    assert (first["status"], first["why"]) == ("stopped", "after 1 s")
    assert (second["status"], second["why"]) == ("skipped", "no time left of 0.0166667 minutes")
    assert "| title of second | skipped no time left" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_was_found(number: signal.Signals, tmp_path: Path) -> None:
    before = signal.signal(number, module("gpu").stop)
    code = f"import os, time; os.kill({os.getpid()}, {int(number)}); time.sleep(60)"
    try:
        done, *rest = ran([section("done", ""), section("killed", code)], tmp_path)["sections"]
    finally:
        signal.signal(number, before)
    assert done["status"] == "done"
    assert [one["why"] for one in rest] == [f"the report was stopped by {number.name}"]


def test_targets_are_ratios_of_the_layers_medians() -> None:
    seconds = {
        "bare layer": 1.0,
        "PEFT LoRA": 2.6,
        "E=1 per sample": 2.0,
        "E=3 per sample": 2.0,
        "E=16 per sample": 2.2,
        "E=16 top-2": 1.3,
    }
    rows = [{"variant": name, "seconds": value} for name, value in seconds.items()]
    entry = {"name": "layer-1024-bf16", "title": "a layer", "status": "done", "why": ""}
    entry |= {"seconds": 3.0, "printed": "", "errors": "", "command": "", "figures": {"rows": rows}}
    whole = report() | {"sections": [entry]}
    found = module("gpu_page").targets(whole)
    assert [row["found"] for row in found] == [1.3, 1.1, 0.25]
    assert [row["reached"] for row in found] == [True, False, True]
    page = module("gpu_page").page(whole)
    assert "| a layer | E = 16 to E = 1 <= 1.05 | 1.1 | missed |" in page


def test_without_cuda_only_the_small_form_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        module("gpu").parse_args([])
    assert "expected a CUDA device; --small" in capsys.readouterr().err
    assert module("gpu").parse_args(["--small"]).small


def test_unknown_sections_are_refused(tmp_path: Path) -> None:
    parts = module("gpu_sections").sections(tmp_path, "cpu", small=True)
    with pytest.raises(SystemExit, match=r"layer-16-bf16.* but got layers"):
        module("gpu").chosen(parts, ["layers"])
    assert [part.name for part in module("gpu").chosen(parts, ["pixels", "layer"])] == [
        "layer-16-bf16",
        "layer-16-fp32",
        "pixels",
    ]


@pytest.mark.slow
def test_the_largest_model_is_chosen_that_leaves_working_space() -> None:
    sections = module("gpu_sections")
    assert sections.parameter_count("flux") == pytest.approx(11.9e9, rel=0.01)
    free = [80, 40, 30, 20, 16]
    sizes = [sections.largest_size(one * 2**30) for one in free]
    assert sizes == ["flux", "flux", "flux-half", "flux-quarter", "middle"]


@pytest.mark.slow
def test_a_part_runs_on_the_cpu_in_its_small_form(tmp_path: Path) -> None:
    arguments = ["--small", "--only", "precisions", "--output_dir", str(tmp_path)]
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        assert module("gpu").main(arguments) == 0
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    (found,) = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    rows = {row["precision"]: row for row in found["figures"]["rows"]}
    assert rows["bf16"]["off by"] == 0
    assert rows["bf16"]["planned"] == pytest.approx(rows["bf16"]["peak"], rel=0.2)
    assert "| bf16 " in (tmp_path / "gpu.md").read_text()
