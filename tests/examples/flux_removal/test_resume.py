from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train
from options.parsing import parse_options
from training_run import checkpoints

Arguments = Callable[..., list[str]]


def run(flags: list[str]) -> Path:
    return train.train(parse_options(flags))


def everything(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def assert_identical(a: Path, b: Path) -> None:
    found, wanted = everything(a), everything(b)
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert different == []
    for name in ("state.json",):
        assert (a / "training_state" / name).read_text() == (
            b / "training_state" / name
        ).read_text()


@pytest.fixture
def long_run(all_losses: dict[str, Any]) -> dict[str, Any]:
    """Both phases, and all that draws random numbers or counts steps."""
    return all_losses | {
        "uniform_steps": 2,
        "max_train_steps": 6,
        "checkpointing_steps": 10,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "router_learning_rate": 0.02,
    }


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Return a function that makes the process get a signal in the middle of a forward pass."""
    calls = []
    real = train.training_step

    def arrange(call: int, number: signal.Signals) -> None:
        def step(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), number)
            return real(*args)

        monkeypatch.setattr(train, "training_step", step)

    return arrange


@pytest.mark.parametrize(
    ("call", "number", "stopped"),
    [(7, signal.SIGINT, 4), (2, signal.SIGTERM, 1)],
    ids=["ctrl-c in the routed phase", "kill in the uniform phase"],
)
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(
    call: int,
    number: signal.Signals,
    stopped: int,
    arguments: Arguments,
    long_run: dict[str, Any],
    stop_at: Callable[[int, signal.Signals], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = run(arguments(**long_run, output_dir=tmp_path / "whole"))
    stop_at(call, number)
    interrupted = run(arguments(**long_run))
    assert interrupted.name == f"checkpoint-{stopped}"
    assert "--resume_from_checkpoint latest" in capsys.readouterr().out
    resumed = run(arguments(**long_run, resume_from_checkpoint="latest"))
    assert resumed.name == whole.name == "checkpoint-6"
    assert_identical(resumed, whole)


def test_signals_are_handled_as_before_after_a_run(arguments: Arguments) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(arguments())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_second_signal_kills() -> None:
    from training_run.interrupts import Interruption

    # A background process may have inherited a handler that ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_a_run_killed_while_it_saves_leaves_the_earlier_checkpoint_whole(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = run(arguments(**steps, output_dir=tmp_path / "whole"))
    real = checkpoints.save_file

    def killed(tensors: dict[str, Tensor], path: Path) -> None:
        if "checkpoint-4" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        run(arguments(**steps))
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    monkeypatch.setattr(checkpoints, "save_file", real)
    resumed = run(arguments(**steps, resume_from_checkpoint="latest"))
    assert_identical(resumed, whole)
    assert not list((tmp_path / "out").glob(".*"))


def test_latest_without_any_checkpoint_starts_at_step_0(
    arguments: Arguments, tmp_path: Path
) -> None:
    plain = run(arguments(output_dir=tmp_path / "plain"))
    assert_identical(run(arguments(resume_from_checkpoint="latest")), plain)


def test_a_folder_can_be_named(arguments: Arguments, tmp_path: Path) -> None:
    steps = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = run(arguments(**steps, output_dir=tmp_path / "whole"))
    early = whole.with_name("checkpoint-2")
    resumed = run(arguments(**steps, resume_from_checkpoint=early))
    assert_identical(resumed, whole)


def test_without_resume_a_used_output_folder_is_refused(arguments: Arguments) -> None:
    run(arguments())
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        run(arguments())


def test_a_folder_that_is_no_checkpoint_raises(arguments: Arguments, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"state\.json"):
        run(arguments(resume_from_checkpoint=tmp_path))


def test_a_routed_run_goes_on_from_a_baseline_with_a_fresh_router(
    arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    baseline = run(arguments(output_dir=tmp_path / "baseline"))
    routed = run(arguments(**all_losses, resume_from_checkpoint=baseline, max_train_steps=4))
    log = (tmp_path / "logs" / "training.log").read_text()
    assert "INFO - The checkpoint has no router: it starts fresh." in log
    assert routed.name == "checkpoint-4"
    saved = load_file(routed / "adapter_model.safetensors")
    assert any("moe_router" in name for name in saved)


def test_a_baseline_goes_on_from_a_routed_run_without_its_router(
    arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    routed = run(arguments(**all_losses, output_dir=tmp_path / "routed"))
    before = load_file(routed / "adapter_model.safetensors")
    assert any("moe_router" in name for name in before)
    still = {"learning_rate": 0.0, "max_train_steps": 4, "resume_from_checkpoint": routed}
    baseline = run(arguments(**still))
    log = (tmp_path / "logs" / "training.log").read_text()
    assert "INFO - The checkpoint has a router, but this run asks none: it is left out." in log
    after = load_file(baseline / "adapter_model.safetensors")
    assert set(after) == {name for name in before if "moe_router" not in name}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    state = load_file(baseline / "training_state" / "optimizer.safetensors")
    assert not any("moe_router" in name for name in state)
    assert all(int(value) == 4 for name, value in state.items() if name.startswith("step/"))


def test_other_targets_than_the_checkpoint_has_raise(arguments: Arguments, tmp_path: Path) -> None:
    first = run(arguments(target_modules="to_q", output_dir=tmp_path / "first"))
    with pytest.raises(ValueError, match="lacks"):
        run(arguments(resume_from_checkpoint=first, max_train_steps=4))


def test_a_changed_order_of_the_data_is_told(arguments: Arguments, tmp_path: Path) -> None:
    run(arguments())
    run(arguments(resume_from_checkpoint="latest", max_train_steps=3, batch_size=1))
    log = (tmp_path / "logs" / "training.log").read_text()
    assert "WARNING - The order of the data starts anew: batch_size was 2 and is 1." in log


def test_a_whole_transformer_resumes_too(arguments: Arguments, tmp_path: Path) -> None:
    steps = {"max_train_steps": 4, "checkpointing_steps": 2, "use_lora": False}
    whole = run(arguments(**steps, output_dir=tmp_path / "whole"))
    resumed = run(arguments(**steps, resume_from_checkpoint=whole.with_name("checkpoint-2")))
    assert_identical(resumed, whole)


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", ".checkpoint-11.part"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == [
        "checkpoint-9",
        "checkpoint-10",
    ]
