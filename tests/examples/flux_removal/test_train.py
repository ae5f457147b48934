from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import Tensor

import train
from moe_lora.losses import ExpertSignals
from options.parsing import parse_options
from removal_data.cache import CachedDataset
from reporting import trackers
from training_run import data

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]


def run(flags: list[str]) -> Path:
    return train.train(parse_options(flags))


def adapter(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "adapter_model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_lines(folder: Path) -> list[str]:
    return (folder / "logs" / "training.log").read_text().splitlines()


def test_a_run_leaves_adapter_experts_and_state(
    arguments: Arguments, all_losses: dict[str, Any]
) -> None:
    folder = run(arguments(**all_losses))
    assert folder.name == "checkpoint-2"
    config = PeftConfig.from_pretrained(folder)
    assert list(config.expert_names) == ["removal_expert", "background_expert", "completion_expert"]
    assert config.router == "three_expert_removal"
    assert any("moe_router" in name for name in adapter(folder))
    experts = sorted(path.name for path in (folder / "experts").iterdir())
    assert experts == ["background_expert", "completion_expert", "removal_expert"]
    names = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert names <= {".safetensors", ".json", ".md"}


def test_both_phases_train_what_they_should(
    arguments: Arguments, all_losses: dict[str, Any]
) -> None:
    flags = arguments(**all_losses, uniform_steps=2, max_train_steps=4, checkpointing_steps=1)
    last = run(flags)
    after = [adapter(last.with_name(f"checkpoint-{n}")) for n in (1, 2, 3, 4)]
    router = [name for name in after[0] if "moe_router" in name and "router.0.weight" in name]
    experts = [name for name in after[0] if "lora_B" in name]
    assert router
    for name in router:
        assert torch.equal(after[0][name], after[1][name])
        assert not torch.equal(after[2][name], after[3][name])
    for name in experts:
        for expert in range(3):
            moved = after[1][name][:, expert] - after[0][name][:, expert]
            assert moved.abs().max() > 0, name


def test_the_log_has_the_documented_lines(
    arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    run(arguments(**all_losses, uniform_steps=1, max_train_steps=3))
    number = r"-?\d+\.\d{4}"
    share = r"\d\.\d\d"
    usage = f"Expert Usage: removal={share}, background={share}, completion={share}"
    lines = [line for line in log_lines(tmp_path) if not line.startswith("INFO - Plan: ")]
    first, routed = lines[:5], lines[5:11]
    statistics = ", ".join(rf'"expert_{i}_usage": \d+' for i in range(3))
    weights = ", ".join([r"\d\.\d+"] * 3)
    patterns = [
        r"Epoch 1/1, Step 2/3",
        f"Total Loss: {number}, Base: {number}, Boundary: {number}, Consistency: {number}, "
        f"Detail: {number}",
        f"Component Losses: base={number}, boundary={number}, consistency={number}, "
        f"detail={number}",
        usage,
        rf'Routing Statistics: \{{{statistics}, "current_weights": \[{weights}\]\}}',
        r"Routing Temperature: 1\.0, Strategy: soft",
    ]
    for line, pattern in zip(routed, patterns, strict=True):
        assert re.fullmatch(f"INFO - {pattern}", line), line
    assert first[3] == "INFO - Expert Usage: removal=0.33, background=0.33, completion=0.33"
    assert first[4] == "INFO - Routing Temperature: 1.0, Strategy: uniform"


def test_the_total_is_the_sum_of_what_the_components_contribute(
    arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    run(arguments(**all_losses, detail_loss_weight=0.7))
    line = next(line for line in log_lines(tmp_path) if "Total Loss" in line)
    total, *parts = (float(number) for number in re.findall(r"\d+\.\d+", line))
    assert total == pytest.approx(sum(parts), abs=3e-4)
    line = next(line for line in log_lines(tmp_path) if "Component Losses" in line)
    raw = [float(number) for number in re.findall(r"\d+\.\d+", line)]
    for part, value, weight in zip(parts, raw, (1.0, 0.3, 0.5, 0.7), strict=True):
        assert part == pytest.approx(weight * value, abs=1e-4)


def test_the_curves_are_written(
    arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    run(arguments(**all_losses, report_to="tensorboard"))
    lines = (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in entries] == [1, 2]
    wanted = {"loss/total", "loss/base", "loss/boundary", "loss/consistency", "loss/detail", "lr"}
    wanted |= {"routing/removal_expert", "routing/entropy", "routing/expert_0_usage"}
    wanted |= {"mask/area_ratio", "mask/edge_complexity"}
    assert wanted <= entries[0].keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs" / "flux_removal"))
    events.Reload()
    assert wanted <= set(events.Tags()["scalars"])
    assert events.Scalars("loss/total")[0].value == pytest.approx(entries[0]["loss/total"])


def test_without_reports_there_are_no_events(arguments: Arguments, tmp_path: Path) -> None:
    run(arguments(report_to="none"))
    assert not list(tmp_path.rglob("events.*"))


CHANGES = {
    "lora_r": 3,
    "lora_alpha": 4,
    "lora_dropout": 0.5,
    "target_modules": "to_q",
    "router": "uniform",
    "router_kwargs": '{"prior_scale": 0.0}',
    "routing_temperature": 0.5,
    "routing_strategy": "hard",
    "task_hint": "background_only",
    "load_balancing_weight": 10.0,
    "router_z_weight": 10.0,
    "expert_dropout": 0.5,
    "orthogonality_weight": 10.0,
    "specialized_warmup_steps": 2,
    "router_learning_rate": 0.1,
    "base_loss_weight": 30.0,
    "boundary_loss_weight": 30.0,
    "consistency_loss_weight": 30.0,
    "detail_loss_weight": 30.0,
    "enable_base_loss": False,
    "enable_boundary_loss": False,
    "enable_consistency_loss": False,
    "enable_detail_loss": False,
    "effect_band": 24,
    "specialized_every": 2,
    "window_margin": 0,
    "mask_augmentation": 1.0,
    "max_sigma": 0.01,
    "uniform_steps": 1,
    "weighting_scheme": "cosmap",
    "logit_mean": 1.0,
    "logit_std": 3.0,
    "batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.02,
    "weight_decay": 0.9,
    "max_grad_norm": 1e-9,
    "lr_scheduler": "linear",
    "mixed_precision": "bf16",
    "seed": 1,
}


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, Tensor]]:
    return {}


@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_what_is_trained(
    name: str,
    arguments: Arguments,
    all_losses: dict[str, Any],
    reference: dict[str, dict[str, Tensor]],
    tmp_path: Path,
) -> None:
    entries = all_losses | {"max_train_steps": 3}
    if not reference:
        reference["plain"] = adapter(run(arguments(**entries, output_dir=tmp_path / "plain")))
    changed = adapter(run(arguments(**(entries | {name: CHANGES[name]}))))
    assert not same(reference["plain"], changed)


@pytest.mark.parametrize(
    ("kept", "name", "values"),
    [
        ({"routing_strategy": "topk"}, "top_k", (1, 2)),
        ({"weighting_scheme": "mode"}, "mode_scale", (0.5, 1.2)),
        ({"lr_scheduler": "constant_with_warmup"}, "lr_warmup_steps", (0, 2)),
        ({}, "num_experts", (1, 3)),
        ({"routing_temperature": 0.1}, "entropy_floor_weight", (0.0, 100.0)),
        ({"entropy_floor_weight": 100.0}, "entropy_floor", (0.3, 0.99)),
        ({"router_phase_steps": 2}, "router_phase", ("frozen", "alone")),
        ({"router_phase": "frozen"}, "router_phase_steps", (1, 2)),
        ({"temperature_steps": 2}, "final_temperature", (0.5, 2.0)),
        ({"final_temperature": 0.2}, "temperature_steps", (1, 3)),
        (
            {"final_temperature": 0.2, "temperature_steps": 3},
            "temperature_course",
            ("linear", "exponential"),
        ),
        ({}, "num_train_epochs", (1, 2)),
    ],
)
def test_options_that_need_others_change_what_is_trained(
    kept: dict[str, Any],
    name: str,
    values: tuple[Any, Any],
    arguments: Arguments,
    all_losses: dict[str, Any],
    tmp_path: Path,
) -> None:
    found = []
    for value in values:
        entries = all_losses | {"max_train_steps": 3} | kept | {name: value}
        flags = arguments(**entries, output_dir=tmp_path / f"out{value}")
        if name == "num_train_epochs":
            at = flags.index("--max_train_steps")
            del flags[at : at + 2]
        found.append(run(flags))
    assert not same(adapter(found[0]), adapter(found[1]))
    if name == "num_train_epochs":
        assert [path.name for path in found] == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("gradient_checkpointing", True), ("vae_checkpointing", True), ("dataloader_num_workers", 1)],
)
def test_options_that_save_memory_or_time_change_no_result(
    name: str, value: Any, arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    plain = adapter(run(arguments(**all_losses, output_dir=tmp_path / "plain")))
    changed = adapter(run(arguments(**all_losses, **{name: value})))
    for key, tensor in plain.items():
        torch.testing.assert_close(tensor, changed[key], rtol=1e-4, atol=1e-5)


def test_cached_latents_change_no_result(
    arguments: Arguments,
    all_losses: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = []
    monkeypatch.setattr(
        data, "CachedDataset", lambda *given: built.append(given) or CachedDataset(*given)
    )
    plain = adapter(run(arguments(**all_losses, output_dir=tmp_path / "plain")))
    assert not built
    changed = adapter(run(arguments(**all_losses, cache_latents=True)))
    assert built
    for key, tensor in plain.items():
        torch.testing.assert_close(tensor, changed[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("on", [True, False])
def test_the_memory_switches_reach_the_models(
    on: bool, arguments: Arguments, random_flux_fill: Path
) -> None:
    from flux_fill.models import load_pipeline
    from training_run.losses import build_loss
    from training_run.parts import build_model

    options = parse_options(arguments(gradient_checkpointing=on, vae_checkpointing=on))
    pipe = load_pipeline(str(random_flux_fill))
    build_model(pipe, options)
    assert pipe.transformer.is_gradient_checkpointing is on
    assert build_loss(options, pipe.vae).decoder.checkpoint is on


def test_a_run_without_specialized_losses_has_no_router(arguments: Arguments) -> None:
    folder = run(arguments())
    assert PeftConfig.from_pretrained(folder).router is None
    assert not any("router" in name for name in adapter(folder))


def test_a_plain_lora_is_one_of_peft(arguments: Arguments, all_losses: dict[str, Any]) -> None:
    folder = run(arguments(**all_losses, adapter="lora", lora_r=6, lora_alpha=3))
    config = PeftConfig.from_pretrained(folder)
    assert (type(config), config.r, config.lora_alpha) == (LoraConfig, 6, 3)
    assert not (folder / "experts").exists()
    tensors = adapter(folder)
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())
    mixture = adapter(run(arguments(lora_r=2, output_dir=folder.parent / "mixture")))
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in mixture.values())


def test_runs_of_one_seed_see_the_same_noise_whatever_they_train(
    arguments: Arguments,
    all_losses: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    interpolate, seen = train.flow.interpolate, list[tuple[Tensor, ...]]()

    def note(*inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return interpolate(*inputs)

    monkeypatch.setattr(train.flow, "interpolate", note)
    changes = (
        {"adapter": "lora"},
        {"expert_signals": True},
        {"router": "token_removal"},
        {"seed": 1},
    )
    for index, changed in enumerate(changes):
        run(arguments(**all_losses, output_dir=tmp_path / str(index), **changed))
    plain, by_signals, by_token, other_seed = (seen[i : i + 2] for i in range(0, 8, 2))
    for drawn in (by_signals, by_token):
        assert all(same_inputs(a, b) for a, b in zip(plain, drawn, strict=True))
    assert not same_inputs(plain[0], other_seed[0])
    assert not torch.equal(plain[0][1], plain[1][1])


def same_inputs(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_with_expert_signals_a_specialized_loss_trains_its_own_expert(
    arguments: Arguments, all_losses: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(signals: ExpertSignals, sigma: Tensor) -> Tensor:
        return torch.full((len(sigma),), signals.components.index("detail"))

    monkeypatch.setattr(ExpertSignals, "assign", always)
    signals = {"expert_signals": True, "max_sigma": 1.0, "max_train_steps": 1}
    options = arguments(**{**all_losses, **signals})
    for name, tensor in adapter(run(options)).items():
        if "lora_B" in name:
            assert (tensor != 0).any(2).any(0).tolist() == [False, False, True], name


def test_routing_can_be_told_apart_from_the_losses(
    arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    run(arguments(routing="always", uniform_steps=1, max_train_steps=3))
    lines = [line for line in log_lines(tmp_path) if "Strategy" in line]
    assert [line.rpartition(" ")[2] for line in lines] == ["uniform", "soft", "soft"]
    folder = run(arguments(**all_losses, routing="never", output_dir=tmp_path / "never"))
    assert PeftConfig.from_pretrained(folder).router is None


def test_without_lora_the_whole_transformer_is_trained(
    arguments: Arguments, random_flux_fill: Path
) -> None:
    folder = run(arguments(use_lora=False))
    before = FluxTransformer2DModel.from_pretrained(random_flux_fill / "transformer").state_dict()
    after = FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    assert before.keys() == after.keys()
    assert not torch.equal(before["x_embedder.weight"], after["x_embedder.weight"])


def test_old_checkpoints_are_deleted(arguments: Arguments, tmp_path: Path) -> None:
    run(arguments(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=2))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["checkpoint-3", "checkpoint-4", "options.yaml"]


def test_checkpoints_come_at_the_given_steps_and_at_the_end(
    arguments: Arguments, tmp_path: Path
) -> None:
    run(arguments(max_train_steps=5, checkpointing_steps=2))
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_the_options_of_a_run_start_it_again(
    arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    first = run(arguments(**all_losses, target_modules="to_q", router_kwargs='{"prior_scale": 0}'))
    again = run([str(tmp_path / "out" / "options.yaml"), "--output_dir", str(tmp_path / "again")])
    assert again == tmp_path / "again" / first.name
    assert same(adapter(again), adapter(first))


def test_a_missing_tracker_raises_before_the_model_is_loaded(
    arguments: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    monkeypatch.setattr(train, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ModuleNotFoundError, match="pip install trackio"):
        run(arguments(report_to="trackio"))


def test_an_unknown_hint_raises(arguments: Arguments, all_losses: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="task_hint"):
        run(arguments(**all_losses, task_hint="sky_focus"))


def test_guidance_for_a_model_without_guidance_embeddings_raises(arguments: Arguments) -> None:
    with pytest.raises(ValueError, match="guidance_scale"):
        run(arguments(guidance_scale=3.5))


def test_guidance_reaches_a_model_that_reads_it(
    arguments: Arguments, guided_flux_fill: Path, tmp_path: Path
) -> None:
    found = []
    for scale in (None, 30.0, 3.5):
        entries = {"flux_fill_id": guided_flux_fill, "output_dir": tmp_path / f"out{scale}"}
        found.append(
            adapter(run(arguments(**entries | ({"guidance_scale": scale} if scale else {}))))
        )
    assert same(found[0], found[1])
    assert not same(found[0], found[2])
