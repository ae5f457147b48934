from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from two_processes import run_in_two_processes

import evaluate
import moe_lora
import train
from flux_fill.models import add_experts, load_pipeline
from options.parsing import parse_options
from training_run.validation import as_in_inference

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]


@pytest.fixture
def checks(triplets: Path) -> dict[str, Any]:
    """Validate before the first step and after every one."""
    return {
        "validation_data_dir": triplets,
        "validation_steps": 1,
        "validation_denoising_steps": 2,
        "validation_at_start": True,
    }


def run(flags: list[str]) -> Path:
    return train.train(parse_options(flags))


def validations(logs: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (logs / "validation.jsonl").read_text().splitlines()]


def without_step(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "step"}


@pytest.mark.parametrize(
    "changed",
    [
        {"task_hint": "background_only", "lora_dropout": 0.2, "expert_dropout": 0.3},
        {"adapter": "lora", "lora_dropout": 0.2},
        {"gradient_accumulation_steps": 2, "uniform_steps": 1, "lr_scheduler": "cosine"},
    ],
    ids=["hint and dropout", "plain lora", "accumulation and phases"],
)
def test_a_run_with_validation_trains_as_one_without(
    changed: dict[str, Any],
    arguments: Arguments,
    all_losses: dict[str, Any],
    checks: dict[str, Any],
    tmp_path: Path,
) -> None:
    found = []
    for name, more in (("plain", {}), ("checked", checks)):
        places = {"output_dir": tmp_path / name, "logging_dir": tmp_path / f"{name}_logs"}
        folder = run(arguments(**all_losses, **changed, **more, **places, max_train_steps=3))
        log = (tmp_path / f"{name}_logs" / "training.log").read_text().splitlines()
        lines = [line for line in log if "Validation" not in line and "Best" not in line]
        metrics = (tmp_path / f"{name}_logs" / "metrics.jsonl").read_text()
        found.append((folder, lines, metrics))
    (plain, lines, metrics), (checked, checked_lines, checked_metrics) = found
    assert len(validations(tmp_path / "checked_logs")) == 4
    assert checked_lines == lines
    assert checked_metrics == metrics
    for file in plain.rglob("*.safetensors"):
        expected, trained = load_file(file), load_file(checked / file.relative_to(plain))
        assert expected.keys() == trained.keys()
        assert all(torch.equal(trained[name], expected[name]) for name in expected), file


def test_an_unchanged_model_has_the_same_values_every_time(
    arguments: Arguments, all_losses: dict[str, Any], checks: dict[str, Any], tmp_path: Path
) -> None:
    run(arguments(**all_losses, **checks, learning_rate=0.0))
    first, *others = validations(tmp_path / "logs")
    assert [values["step"] for values in others] == [1, 2]
    assert all(without_step(values) == without_step(first) for values in others)
    seeded = checks | {"validation_seed": 1, "output_dir": tmp_path / "other"}
    run(arguments(**all_losses, **seeded, learning_rate=0.0))
    other = validations(tmp_path / "logs")[0]
    assert other["loss"] != first["loss"]
    assert other["psnr/inside"] != first["psnr/inside"]


@pytest.mark.parametrize(
    "changed",
    [
        {"task_hint": "background_only", "lora_dropout": 0.3, "expert_dropout": 0.3},
        {"adapter": "lora", "lora_dropout": 0.3},
        {"use_lora": False},
    ],
    ids=["routed", "plain lora", "whole transformer"],
)
def test_values_are_those_of_evaluate(
    changed: dict[str, Any],
    arguments: Arguments,
    all_losses: dict[str, Any],
    checks: dict[str, Any],
    random_flux_fill: Path,
    triplets: Path,
    tmp_path: Path,
) -> None:
    learned = {"learning_rate": 0.1, "validation_steps": 2, "validation_at_start": False}
    checkpoint = run(arguments(**all_losses, **checks | changed | learned))
    (values,) = validations(tmp_path / "logs")
    flags = ["--flux_fill_id", random_flux_fill, "--data_dir", triplets, "--steps", 2]
    flags += ["--checkpoint", checkpoint, "--batch_size", 2, "--output_dir", tmp_path / "found"]
    evaluate.main([*map(str, flags), "--base_model"])
    found = json.loads((tmp_path / "found" / "metrics.json").read_text())["psnr"]
    assert found["trained"] != found["base"]
    for name, region in {"whole": "whole", "inside": "inside", "shadow": "effect"}.items():
        assert values[f"psnr/{region}"] == pytest.approx(found["trained"][name], abs=1e-5)


def test_half_precision_is_validated_too(
    arguments: Arguments, all_losses: dict[str, Any], checks: dict[str, Any], tmp_path: Path
) -> None:
    for index, more in enumerate(({}, {"use_lora": False})):
        logs = tmp_path / f"logs{index}"
        places = {"output_dir": tmp_path / str(index), "logging_dir": logs}
        run(arguments(**all_losses, **checks, **more, **places, mixed_precision="bf16"))
        assert all(np.isfinite(list(values.values())).all() for values in validations(logs))


def test_a_held_out_share_is_not_trained_on(
    arguments: Arguments, checks: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[float] = set()
    real = train.training_step

    def step(batch: dict[str, Any], *others: Any) -> Any:
        seen.update(batch["src"].mean((1, 2, 3)).tolist())
        return real(batch, *others)

    monkeypatch.setattr(train, "training_step", step)
    runs = []
    build = train.prepare
    monkeypatch.setattr(train, "prepare", lambda *given: runs.append(build(*given)) or runs[-1])
    shared = checks | {"validation_data_dir": None, "validation_share": 0.4}
    flags = arguments(**{k: v for k, v in shared.items() if v is not None}, num_train_epochs=2)
    at = flags.index("--max_train_steps")
    run(flags[:at] + flags[at + 2 :])
    scenes = runs[0].validator.scenes
    assert len(scenes) == 2
    held = {float(scenes[index]["src"].mean()) for index in range(2)}
    assert len(seen) == 3
    assert not any(abs(a - b) < 1e-6 for a in held for b in seen)


def test_the_contact_sheet_reaches_the_folder_and_tensorboard(
    arguments: Arguments, checks: dict[str, Any], tmp_path: Path
) -> None:
    run(arguments(**checks, report_to="tensorboard", validation_samples=3))
    sheets = sorted((tmp_path / "logs" / "validation").iterdir())
    assert [path.name for path in sheets] == [f"step-{step:06d}.png" for step in (0, 1, 2)]
    events = EventAccumulator(str(tmp_path / "logs" / "flux_removal"), size_guidance={"images": 0})
    events.Reload()
    shown = events.Images("validation/removals")
    assert [event.step for event in shown] == [0, 1, 2]
    with Image.open(sheets[-1]) as sheet:
        assert (shown[-1].width, shown[-1].height) == sheet.size
        assert sheet.height < 4 * 2 * 64
    loss = events.Scalars("validation/loss")
    values = validations(tmp_path / "logs")
    assert [event.value for event in loss] == pytest.approx([each["loss"] for each in values])


def test_the_model_is_as_it_was_after_a_validation_and_after_an_error(
    random_flux_fill: Path, arguments: Arguments, all_losses: dict[str, Any]
) -> None:
    pipe = load_pipeline(str(random_flux_fill))
    options = parse_options(arguments(**all_losses, task_hint="background_only"))
    model = add_experts(pipe.transformer, options, routed=True).train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm))
    frozen.eval()
    moe_lora.set_router_inputs(model, task_hint="background_only")
    stats = moe_lora.routing_stats(model)
    stats.update(torch.tensor([[0.5, 0.25, 0.25]]))
    parts = SimpleNamespace(
        accelerator=Accelerator(cpu=True), pipe=pipe, model=model, options=options
    )
    modes = [module.training for module in model.modules()]
    before, drawn = stats.as_dict(), (torch.get_rng_state(), random.getstate())

    def validate() -> None:
        with as_in_inference(parts):
            assert not torch.is_grad_enabled()
            assert not any(module.training for module in model.modules())
            torch.manual_seed(7)
            stats.update(torch.tensor([[0.0, 0.0, 1.0]]))
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        validate()
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert stats.as_dict() == before
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]


def test_two_processes_find_what_one_finds(
    arguments: Arguments, all_losses: dict[str, Any], checks: dict[str, Any], tmp_path: Path
) -> None:
    """Three batches of two sizes for two processes, one of which repeats a batch."""
    run(arguments(**all_losses, **checks, output_dir=tmp_path / "one", max_train_steps=1))
    alone = validations(tmp_path / "logs")[0]
    flags = arguments(
        **all_losses, **checks, logging_dir=tmp_path / "both", max_train_steps=2, learning_rate=0.1
    )
    run_in_two_processes(train.__file__, *flags)
    first, *others = validations(tmp_path / "both")
    assert first == pytest.approx(alone, rel=1e-4)
    assert [values["step"] for values in others] == [1, 2]
    assert others[-1]["loss"] != first["loss"]
    assert (tmp_path / "out" / "checkpoint-best" / "adapter_model.safetensors").is_file()
    log = (tmp_path / "both" / "training.log").read_text()
    assert log.count("Validation, Step") == 3
