from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

import train
from moe_lora.planning import Fit
from options.parsing import parse_options
from training_run.plan import better, describe, flags_of, plan_run

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


def test_storage_and_offloading_change_the_plan(arguments: Arguments) -> None:
    plain = plan_run(parse_options(arguments()), 64, 64, steps=False)
    for memory in ({"base_precision": "nf4"}, {"offload": True}):
        less = plan_run(parse_options([*arguments(**memory), "--plan"]), 64, 64, steps=False)
        assert less.base < 0.7 * plain.base


def test_settings_that_fit_are_named_by_flags_that_plan_the_same(arguments: Arguments) -> None:
    flags = [*arguments(mixed_precision="bf16"), "--plan"]
    plan = plan_run(parse_options(flags), 64, 64)
    fit = plan.fits[24]
    assert fit is not None
    assert not fit.checkpointing
    said = f"--base_precision bf16 --lora_r 2 --optimizer AdamW: {fit.memory / 2**30:.3f} GiB"
    assert f"fits 24 GiB           {said}" in describe(plan)
    small = Fit("nf4", 2, "adamw_8bit", 0, offload=False, checkpointing=True)
    words = "--base_precision nf4 --lora_r 2 --optimizer bnb.AdamW8bit --gradient_checkpointing"
    assert flags_of(small) == words
    away = Fit("bf16", 2, "adamw", 0, offload=True, checkpointing=False)
    assert flags_of(away) == "--base_precision bf16 --lora_r 2 --optimizer AdamW --offload"


def test_the_higher_rank_is_the_better_setting() -> None:
    own, other = Fit("nf4", 4, "adamw", 0), Fit("bf16", 8, "adamw", 0)
    assert better(own, other) is other
    assert better(own, Fit("bf16", 4, "adamw", 0)) is own
    assert better(None, own) is own
    assert better(own, None) is own
    assert better(None, None) is None


def test_a_run_without_experts_has_no_plan(arguments: Arguments) -> None:
    with pytest.raises(ValueError, match="Expected a mixture with `plan`"):
        parse_options([*arguments(adapter="lora"), "--plan"])
