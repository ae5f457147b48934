from __future__ import annotations

import json
import math
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from peft import get_peft_model
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import moe_lora
from moe_lora import RemovalLoss
from moe_lora.losses import RemovalLossOutput
from options.parsing import parse_options
from reporting.reporter import LossWindow, Reporter


def output(**components: float) -> RemovalLossOutput:
    return RemovalLossOutput(torch.tensor(0.0), {k: torch.tensor(v) for k, v in components.items()})


def test_means_run_over_the_samples_that_passed_the_gate() -> None:
    loss = RemovalLoss(1.0, None, 0.5, None, max_sigma=0.5)
    window, accelerator = LossWindow(), Accelerator(cpu=True)
    window.add(loss, output(base=1.0, consistency=0.4), torch.tensor(1.2), torch.tensor([0.1, 0.9]))
    window.add(loss, output(base=3.0, consistency=0.0), torch.tensor(3.0), torch.tensor([0.8, 0.9]))
    found = window.means(accelerator)
    assert found["total"] == pytest.approx(2.1)
    assert found["loss/base"] == pytest.approx(2.0)
    assert found["loss/consistency"] == pytest.approx(0.4)
    assert found["contribution/consistency"] == pytest.approx(0.5 * 0.4 / 2)
    assert found["contribution/base"] + found["contribution/consistency"] == pytest.approx(2.1)
    window.add(loss, output(base=5.0, consistency=0.0), torch.tensor(5.0), torch.tensor([0.9]))
    later = window.means(accelerator)
    assert later["loss/base"] == pytest.approx(5.0)
    assert math.isnan(later["loss/consistency"])


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=4)
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden_states)


WEIGHTS = [0.45, 0.35, 0.20]


def make_reporter(tmp_path: Path, report_to: str = "none", *more: str) -> Reporter:
    flags = ["--train_data_dir", "d", "--report_to", report_to, "--logging_dir", str(tmp_path)]
    flags += ["--enable_detail_loss", "--enable_mask_info", *more]
    accelerator = Accelerator(
        cpu=True,
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(logging_dir=str(tmp_path)),
    )
    return Reporter(accelerator, parse_options(flags), total_steps=10, steps_per_epoch=5)


def make_model(weights: list[float]) -> nn.Module:
    config = moe_lora.MoELoraConfig(
        target_modules=["linear"], router="fixed", router_kwargs={"weights": weights}
    )
    return get_peft_model(Tokens(), config)


def report(
    reporter: Reporter,
    model: nn.Module,
    step: int,
    batch: dict[str, torch.Tensor] | None = None,
    mode: str = "routed",
) -> None:
    loss = RemovalLoss(1.0, None, None, None)
    model(torch.zeros(2, 3, 4))
    reporter.window.add(loss, output(base=1.0), torch.tensor(1.0), torch.tensor([0.5, 0.25]))
    reporter.entry(step, model, mode, {}, batch)


def test_a_collapse_is_told_once_until_it_is_over(tmp_path: Path) -> None:
    reporter, collapsed = make_reporter(tmp_path), make_model([0.97, 0.02, 0.01])
    for step, model in enumerate([collapsed, collapsed, make_model([0.4, 0.3, 0.3]), collapsed]):
        report(reporter, model, step + 1)
    warnings = [
        line
        for line in (tmp_path / "training.log").read_text().splitlines()
        if line.startswith("WARNING - The router has collapsed: removal_expert has 97%")
    ]
    assert len(warnings) == 2


def test_a_hint_that_leaves_one_expert_alone_is_no_collapse(tmp_path: Path) -> None:
    alone = make_model([1.0, 0.0, 0.0])
    report(make_reporter(tmp_path / "only", "none", "--task_hint", "removal_only"), alone, 1)
    assert "WARNING" not in (tmp_path / "only" / "training.log").read_text()
    report(make_reporter(tmp_path / "focus", "none", "--task_hint", "removal_focus"), alone, 1)
    assert "WARNING" in (tmp_path / "focus" / "training.log").read_text()


def test_usage_counts_and_current_weights_are_in_the_log(tmp_path: Path) -> None:
    reporter, model = make_reporter(tmp_path), make_model(WEIGHTS)
    report(reporter, model, 1)
    report(reporter, model, 2, mode="uniform")
    log = (tmp_path / "training.log").read_text()
    (line,) = [line for line in log.splitlines() if "Routing Statistics" in line]
    assert json.loads(line.partition(": ")[2]) == {
        "expert_0_usage": 2,
        "expert_1_usage": 0,
        "expert_2_usage": 0,
        "current_weights": WEIGHTS,
    }


def test_the_lines_of_the_log_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(make_reporter(tmp_path), make_model(WEIGHTS), 1)
    log = (tmp_path / "training.log").read_text()
    assert log.count("\n") == 6
    assert capsys.readouterr().out == log


def test_a_new_run_puts_the_logs_of_another_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        reporter = make_reporter(tmp_path, report_to="tensorboard")
        report(reporter, make_model(WEIGHTS), step)
        reporter.accelerator.end_training()
    for name, step in (("-1", 1), ("-2", 2), ("", 3)):
        (line,) = (tmp_path / f"metrics{name}.jsonl").read_text().splitlines()
        assert json.loads(line)["step"] == step
        assert f"Step {step}/10" in (tmp_path / f"training{name}.log").read_text()
        events = events_of(tmp_path / f"flux_removal{name}").Scalars("loss/total")
        assert [event.step for event in events] == [step]


def test_a_run_that_goes_on_adds_to_its_logs(tmp_path: Path) -> None:
    report(make_reporter(tmp_path), make_model(WEIGHTS), 1)
    going_on = make_reporter(tmp_path, "none", "--resume_from_checkpoint", "latest")
    report(going_on, make_model(WEIGHTS), 2)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert not list(tmp_path.glob("*-1*"))


def test_statistics_start_anew_with_every_entry(tmp_path: Path) -> None:
    reporter, model = make_reporter(tmp_path), make_model([0.45, 0.35, 0.20])
    for step in (1, 2):
        report(reporter, model, step)
    log = (tmp_path / "training.log").read_text()
    assert log.count("INFO - Expert Usage: removal=0.45, background=0.35, completion=0.20") == 2
    assert "INFO - Epoch 1/2, Step 2/10" in log
    assert moe_lora.routing_stats(model).usage == [0, 0, 0]


def events_of(folder: Path) -> EventAccumulator:
    (file,) = folder.rglob("events.*")
    return EventAccumulator(str(file)).Reload()


def test_figures_of_routing_are_in_tensorboard(tmp_path: Path) -> None:
    reporter, model = make_reporter(tmp_path, report_to="tensorboard"), make_model(WEIGHTS)
    mask = torch.zeros(2, 1, 32, 32)
    mask[..., 8:16] = 1
    batch = {"src": torch.rand(2, 3, 32, 32), "mask": mask}
    for step in range(1, 11):
        report(reporter, model, step, batch)
    reporter.accelerator.end_training()
    events = events_of(tmp_path)
    drawn = {tag: [image.step for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert drawn == {
        "routing/sigma": [4, 10],
        "routing/mask_size": [4, 10],
        "routing/edge_complexity": [4, 10],
        "routing/usage": [10],
    }
    image = Image.open(BytesIO(events.Images("routing/usage")[0].encoded_image_string))
    assert image.size == (800, 450)
    assert len(image.getcolors(2**24)) > 10


def test_a_uniform_run_has_its_usage_drawn_and_nothing_else(tmp_path: Path) -> None:
    reporter, model = make_reporter(tmp_path, report_to="tensorboard"), make_model(WEIGHTS)
    moe_lora.set_routing_mode(model, "uniform")
    for step in (5, 10):
        report(reporter, model, step, mode="uniform")
    reporter.accelerator.end_training()
    assert events_of(tmp_path).Tags()["images"] == ["routing/usage"]


def test_nothing_is_drawn_without_tensorboard(tmp_path: Path) -> None:
    reporter = make_reporter(tmp_path)
    report(reporter, make_model(WEIGHTS), 10)
    assert reporter.figures is None
