from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

import train
from options.parsing import parse_options
from training_run.plan import describe, plan_run

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]


def bytes_of_tensors(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(
                t.numel() * t.element_size() for t in map(tensors.get_tensor, tensors.keys())
            )
    return total


def test_the_plan_names_the_size_of_the_runs_checkpoints(arguments: Arguments) -> None:
    options = parse_options(arguments(max_train_steps=1))
    folder = train.train(options)
    plan = plan_run(options, 64, 96)
    # The optimizer also counts its steps, one number for each parameter; routers have no expert.
    assert bytes_of_tensors(folder) == pytest.approx(plan.checkpoint + plan.adapter_file, rel=0.02)
    assert plan.activations is not None
    said = (folder.parent.parent / "logs" / "training.log").read_text()
    assert f"{plan.trained_parameters:,} trained parameters in {plan.layers} layers" in said
    assert re.search(r"activations +unknown", said)


def test_the_flag_prints_the_plan_and_loads_no_model(
    arguments: Arguments, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    flags = [*arguments(), "--plan"]
    train.main(flags)
    options = parse_options(flags)
    assert capsys.readouterr().out == describe(plan_run(options, 64, 96)) + "\n"
    assert not Path(options.output_dir).exists()


def test_precision_checkpointing_and_batch_size_change_the_plan(arguments: Arguments) -> None:
    plan = plan_run(parse_options(arguments()), 64, 64)
    half = plan_run(parse_options(arguments(mixed_precision="bf16")), 64, 64)
    assert half.base == plan.base / 2
    more = plan_run(parse_options(arguments(batch_size=4)), 64, 64)
    assert plan.activations is not None
    assert more.activations is not None
    assert more.activations > 1.8 * plan.activations
    less = plan_run(parse_options(arguments(gradient_checkpointing=True)), 64, 64)
    assert less.activations is not None
    assert less.activations < plan.activations


def test_a_run_without_experts_has_no_plan(arguments: Arguments) -> None:
    with pytest.raises(ValueError, match="Expected a mixture with `plan`"):
        parse_options([*arguments(adapter="lora"), "--plan"])
