from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import Tensor

import train
from options.parsing import parse_options
from training_run.best_checkpoint import BestCheckpoint
from training_run.validation import Validator

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]
Values = Callable[[dict[int, float]], None]


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    """Return a function that decides the value of `psnr/inside` and of the loss by step."""

    def decide(by_step: dict[int, float]) -> None:
        calls = iter(by_step.values())

        def mean_values(scenes: Any) -> dict[str, float]:
            value = next(calls)
            return {"loss": value, "psnr/inside": value}

        monkeypatch.setattr("training_run.validation.mean_values", mean_values)

    return decide


@pytest.fixture
def flags(arguments: Arguments, triplets: Path) -> Callable[..., list[str]]:
    def make(**changed: Any) -> list[str]:
        settings: dict[str, Any] = {
            "validation_data_dir": triplets,
            "validation_steps": 1,
            "validation_samples": 1,
            "validation_denoising_steps": 1,
            "max_train_steps": 4,
            "checkpointing_steps": 1,
            "learning_rate": 0.1,
        }
        return arguments(**settings | changed)

    return make


def run(flags: list[str]) -> Path:
    return train.train(parse_options(flags))


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    found, wanted = adapter(a), adapter(b)
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("metric", "best"), [("psnr/inside", 2), ("loss", 3)])
def test_the_best_by_the_metric_is_kept_and_told(
    metric: str, best: int, flags: Callable[..., list[str]], values: Values, tmp_path: Path
) -> None:
    values({1: 10.0, 2: 12.0, 3: 8.0, 4: 11.0})
    last = run(flags(validation_metric=metric))
    folder = tmp_path / "out" / "checkpoint-best"
    record = json.loads((folder / "validation.json").read_text())
    assert record["step"] == best
    assert same(folder, last.with_name(f"checkpoint-{best}"))
    assert not same(folder, last)
    assert not (folder / "training_state").exists()
    log = (tmp_path / "logs" / "training.log").read_text()
    told = [line for line in log.splitlines() if "Best checkpoint" in line]
    assert told[-1].startswith(f"INFO - Best checkpoint: step {best}, {metric} ")
    assert str(folder) in told[-1]
    assert f"step {best} of 4" in ModelCard.load(folder / "README.md").text.replace("\n", " ")


def test_no_limit_deletes_the_best(
    flags: Callable[..., list[str]], values: Values, tmp_path: Path
) -> None:
    values({1: 12.0, 2: 10.0, 3: 10.0, 4: 10.0})
    run(flags(checkpoints_total_limit=1))
    found = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert found == ["checkpoint-4", "checkpoint-best"]


def test_a_resumed_run_goes_on_with_the_best_value(
    flags: Callable[..., list[str]], values: Values, tmp_path: Path
) -> None:
    values({1: 11.0, 2: 12.0})
    run(flags(max_train_steps=2))
    kept = adapter(tmp_path / "out" / "checkpoint-best")
    values({3: 11.5, 4: 11.0})
    resumed = {"resume_from_checkpoint": "latest"}
    run(flags(**resumed))
    found = adapter(tmp_path / "out" / "checkpoint-best")
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    values({5: 13.0})
    run(flags(**resumed, max_train_steps=5))
    record = json.loads((tmp_path / "out" / "checkpoint-best" / "validation.json").read_text())
    assert record["step"] == 5


def test_another_validation_starts_anew(
    flags: Callable[..., list[str]], values: Values, tmp_path: Path
) -> None:
    values({1: 12.0, 2: 12.0})
    run(flags(max_train_steps=2))
    values({3: 5.0})
    changed = {"resume_from_checkpoint": "latest", "validation_denoising_steps": 2}
    run(flags(**changed, max_train_steps=3))
    record = json.loads((tmp_path / "out" / "checkpoint-best" / "validation.json").read_text())
    assert record["step"] == 3
    log = (tmp_path / "logs" / "training.log").read_text()
    assert "WARNING - The validation differs from that of" in log


def test_the_model_before_the_first_step_is_not_the_best(
    flags: Callable[..., list[str]], values: Values, tmp_path: Path
) -> None:
    values({0: 20.0, 1: 10.0})
    run(flags(validation_at_start=True, max_train_steps=1))
    record = json.loads((tmp_path / "out" / "checkpoint-best" / "validation.json").read_text())
    assert record["step"] == 1


def test_a_run_killed_between_two_renames_keeps_the_earlier_one(tmp_path: Path) -> None:
    replaced = tmp_path / ".checkpoint-best.old"
    replaced.mkdir()
    record = {"step": 7, "values": {"loss": 0.5}, "settings": {"seed": 0}}
    (replaced / "validation.json").write_text(json.dumps(record))
    card: Any = None
    best = BestCheckpoint(tmp_path, "loss", {"seed": 0}, card)
    assert (best.step, best.value) == (7, 0.5)
    assert (tmp_path / "checkpoint-best" / "validation.json").is_file()
    assert not replaced.exists()


def test_a_metric_without_a_value_raises(flags: Callable[..., list[str]], values: Values) -> None:
    values({1: 1.0})
    with pytest.raises(ValueError, match="a value of `validation_metric` psnr/effect"):
        run(flags(validation_metric="psnr/effect"))


def test_a_new_run_is_refused_where_a_best_checkpoint_is(
    flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "out" / "checkpoint-best").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="checkpoint-best is there already"):
        run(flags())


def test_the_best_is_not_a_checkpoint_to_resume_from(
    flags: Callable[..., list[str]], tmp_path: Path
) -> None:
    run(flags(max_train_steps=1))
    best = tmp_path / "out" / "checkpoint-best"
    with pytest.raises(FileNotFoundError, match=r"training_state/state\.json"):
        run(flags(resume_from_checkpoint=best))


def test_validations_are_due_at_their_steps_and_at_the_end() -> None:
    def due(at_start: bool) -> list[int]:
        validator: Any = Validator.__new__(Validator)
        validator.parts = type("Parts", (), {})()
        validator.parts.options = parse_options(
            ["--train_data_dir", "d", "--validation_data_dir", "v", "--validation_steps", "4"]
            + (["--validation_at_start"] if at_start else [])
        )
        validator.reporter = type("Reporter", (), {"total_steps": 10})()
        return [step for step in range(11) if validator.due(step)]

    assert due(at_start=False) == [4, 8, 10]
    assert due(at_start=True) == [0, 4, 8, 10]
