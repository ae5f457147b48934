from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

import train
from moe_lora.schedules import Schedule, Setting, preset
from options.parsing import parse_options
from training_run.schedule import build_schedule

CONFIGS = Path(train.__file__).parent / "configs"
LOSSES = ["--enable_boundary_loss", "--enable_detail_loss", "--enable_mask_info"]
WEIGHTS = {"base": 1.0, "boundary": 0.3, "detail": 0.2}


def schedule(*words: str) -> Schedule:
    return build_schedule(parse_options([*words, "--train_data_dir", "data"]))


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ("progressive", [], preset("1")),
        ("progressive", ["--uniform_steps", "500"], preset("1", foundation_steps=500)),
        ("routed", [], preset("A")),
        ("routed", [], preset("2")),
        ("baseline", [], preset("B")),
        ("baseline", [], preset("3")),
        (
            "baseline",
            ["--enable_boundary_loss", "--boundary_loss_weight", "0.8", "--enable_mask_info"],
            preset("C"),
        ),
    ],
)
def test_the_configs_are_the_strategies(config: str, flags: list[str], expected: Schedule) -> None:
    found = schedule(str(CONFIGS / f"{config}.yaml"), *flags)
    for step in (0, 1, 499, 500, 999, 1000, 5000):
        assert found.at(step) == expected.at(step)


def test_all_that_changes_in_a_run() -> None:
    flags = ["--uniform_steps", "2", "--router_phase", "alone", "--router_phase_steps", "3"]
    flags += ["--specialized_warmup_steps", "2", "--routing_temperature", "2"]
    flags += ["--final_temperature", "1", "--temperature_steps", "2"]
    found = schedule(*LOSSES, *flags, "--temperature_course", "linear")
    half = {"base": 1.0, "boundary": 0.15, "detail": 0.1}
    assert [found.at(step) for step in range(8)] == [
        *[Setting(0, "uniform", None, {"base": 1.0}, "all")] * 2,
        Setting(1, "routed", 2.0, half, "router"),
        *[Setting(1, "routed", 2.0, WEIGHTS, "router")] * 2,
        Setting(2, "routed", 2.0, WEIGHTS, "all"),
        Setting(2, "routed", 1.5, WEIGHTS, "all"),
        Setting(2, "routed", 1.0, WEIGHTS, "all"),
    ]


def test_the_router_decides_the_mode_where_losses_do_not() -> None:
    assert schedule("--routing", "always").at(0).mode == "routed"
    assert schedule(*LOSSES, "--routing", "never").at(0).mode == "uniform"
    assert schedule(*LOSSES, "--adapter", "lora").at(0).mode == "uniform"


@pytest.mark.parametrize(
    ("phase", "still"), [("frozen", "moe_router"), ("alone", "moe_lora_experts")]
)
def test_a_frozen_part_is_saved_as_it_was(
    phase: str,
    still: str,
    arguments: Callable[..., list[str]],
    all_losses: dict[str, Any],
) -> None:
    flags = arguments(
        **all_losses,
        router_phase=phase,
        router_phase_steps=2,
        max_train_steps=3,
        checkpointing_steps=1,
    )
    last = train.train(parse_options(flags))
    one, two, three = (
        load_file(last.with_name(f"checkpoint-{n}") / "adapter_model.safetensors")
        for n in (1, 2, 3)
    )
    for name in one:
        assert torch.equal(one[name], two[name]) or still not in name
    moved = [name for name in one if not torch.equal(two[name], three[name])]
    assert any(still in name for name in moved)


def test_a_final_temperature_of_zero_is_not_ignored() -> None:
    with pytest.raises(ValueError, match="Expected `end` to be finite and > 0, but got 0"):
        schedule(*LOSSES, "--final_temperature", "0", "--temperature_steps", "2")


def test_the_temperature_is_logged_and_saved_as_it_moves(
    arguments: Callable[..., list[str]], all_losses: dict[str, Any], tmp_path: Path
) -> None:
    moves = {"routing_temperature": 2.0, "final_temperature": 1.0, "temperature_steps": 2}
    flags = arguments(**all_losses, **moves, temperature_course="linear", max_train_steps=3)
    last = train.train(parse_options(flags))
    assert PeftConfig.from_pretrained(last).routing_temperature == 1.0
    lines = (tmp_path / "logs" / "training.log").read_text().splitlines()
    told = [line.split()[4].rstrip(",") for line in lines if "Routing Temperature" in line]
    assert told == ["2.0", "1.5", "1.0"]
    metrics = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in metrics]
    assert [entry["routing/temperature"] for entry in entries] == [2.0, 1.5, 1.0]
    assert {entry["routing/idle_experts"] for entry in entries} == {0}
