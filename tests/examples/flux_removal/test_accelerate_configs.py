"""The configuration files of accelerate: train.py in two processes on the CPU with each."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from two_processes import launch_with_accelerate

import remove
import train
from flux_fill.models import load_pipeline
from options.parsing import parse_options

pytestmark = pytest.mark.slow

CONFIGS = Path(train.__file__).parent / "configs" / "accelerate"
KINDS = {
    "ddp": "DDP",
    "fsdp2": "FSDP",
    "deepspeed_zero2": "ZeRO-2",
    "deepspeed_zero3": "ZeRO-3",
}
WEIGHTS = "adapter_model.safetensors"

Flags = Callable[..., list[str]]


def needs_deepspeed(config: str) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("accelerate")
    return path


@pytest.fixture(scope="module")
def flags(arguments_in: Flags) -> Flags:
    """Return a function that makes the flags of a run in a folder."""

    def make(folder: Path, **changed: Any) -> list[str]:
        losses = dict.fromkeys(("enable_boundary_loss", "enable_mask_info"), True)
        usual = {"max_train_steps": 4, "checkpointing_steps": 2, "batch_size": 1, "max_sigma": 1.0}
        return arguments_in(folder, **(losses | usual | changed))

    return make


@pytest.fixture(scope="module")
def trained(folder: Path, flags: Flags) -> Callable[[str], Path]:
    """Return a function that trains once with a configuration, and returns the checkpoints."""

    def train_with(config: str) -> Path:
        needs_deepspeed(config)
        output = folder / config / "out"
        if not output.exists():
            printed = launch_with_accelerate(CONFIGS / f"{config}.yaml", *flags(folder / config))
            assert set(re.findall(r"distributed: ([\w-]+)", printed)) == {KINDS[config]}
        return output

    return train_with


def everything(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("config", KINDS)
def test_a_run_trains_saves_and_resumes_exactly(
    config: str, trained: Callable[[str], Path], flags: Flags, tmp_path: Path
) -> None:
    whole = trained(config) / "checkpoint-4"
    resume = flags(tmp_path, resume_from_checkpoint=whole.with_name("checkpoint-2"))
    launch_with_accelerate(CONFIGS / f"{config}.yaml", *resume)
    found, wanted = everything(tmp_path / "out" / "checkpoint-4"), everything(whole)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    early = load_file(whole.with_name("checkpoint-2") / WEIGHTS)
    moved = [name for name in early if not torch.equal(early[name], wanted[f"{WEIGHTS}/{name}"])]
    assert any("moe_router" in name for name in moved)
    assert any("moe_lora_experts" in name for name in moved)


@pytest.mark.parametrize("config", [name for name in KINDS if name != "ddp"])
def test_sharded_runs_equal_ddp(config: str, trained: Callable[[str], Path]) -> None:
    found, wanted = (
        everything(trained(config) / "checkpoint-4"),
        everything(trained("ddp") / "checkpoint-4"),
    )
    # The same files and names, with whole tensors: weights, experts and optimizer.
    assert {n: v.shape for n, v in found.items()} == {n: v.shape for n, v in wanted.items()}
    for name, value in wanted.items():
        # AdamW makes steps of the noise in tiny gradients.
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("config", [name for name in KINDS if name != "ddp"])
def test_one_process_goes_on_from_a_sharded_run_and_removes_with_it(
    config: str,
    trained: Callable[[str], Path],
    flags: Flags,
    random_flux_fill: Path,
    triplets: Path,
    tmp_path: Path,
) -> None:
    early = trained(config) / "checkpoint-2"
    still = flags(tmp_path, resume_from_checkpoint=early, learning_rate=0.0, weight_decay=0.0)
    last = train.train(parse_options(still))
    before, after = load_file(early / WEIGHTS), load_file(last / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    state = load_file(last / "training_state" / "optimizer.safetensors")
    assert {int(value) for name, value in state.items() if name.startswith("step/")} == {4}
    expert = early / "experts" / "removal_expert"
    PeftModel.from_pretrained(load_pipeline(str(random_flux_fill)).transformer, expert)
    output = tmp_path / "removed.png"
    picture = ["--image", str(triplets / "src" / "000.png"), "--output", str(output)]
    picture += ["--mask", str(triplets / "mask" / "000.png"), "--steps", "1"]
    model = ["--checkpoint", str(early), "--flux_fill_id", str(random_flux_fill)]
    remove.main([*picture, *model])
    assert output.is_file()


def test_fsdp2_keeps_routers_in_float32_beside_a_bfloat16_base_and_averages(
    flags: Flags, tmp_path: Path
) -> None:
    given = flags(tmp_path, mixed_precision="bf16", ema_decay=0.5, gradient_accumulation_steps=2)
    launch_with_accelerate(CONFIGS / "fsdp2.yaml", *given)
    last = tmp_path / "out" / "checkpoint-4"
    average = load_file(last / WEIGHTS)
    weights = load_file(last / "training_state" / "weights" / WEIGHTS)
    assert {value.dtype for value in average.values()} == {torch.float32}
    assert average.keys() == weights.keys()
    assert any(not torch.equal(average[name], weights[name]) for name in average)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
@pytest.mark.parametrize(
    ("config", "changed", "told"),
    [
        ("deepspeed_zero3", {"ema_decay": 0.5}, "Expected no `ema_decay` with DeepSpeed ZeRO-3"),
        ("deepspeed_zero2", {"optimizer": "Adafactor"}, "Adam, AdamW, SGD with DeepSpeed"),
        ("deepspeed_zero2", {"mixed_precision": "fp16"}, "no or bf16 with DeepSpeed"),
    ],
)
def test_what_deepspeed_cannot_do_raises(
    config: str, changed: dict[str, Any], told: str, flags: Flags, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=told):
        launch_with_accelerate(CONFIGS / f"{config}.yaml", *flags(tmp_path, **changed))


@pytest.mark.parametrize("config", KINDS)
def test_a_run_with_validation_trains_as_one_without_and_keeps_its_best(
    config: str, trained: Callable[[str], Path], flags: Flags, triplets: Path, tmp_path: Path
) -> None:
    plain = trained(config) / "checkpoint-4"
    checks = {"validation_data_dir": triplets, "validation_steps": 2}
    checked = flags(tmp_path, **checks, validation_denoising_steps=1, validation_at_start=True)
    launch_with_accelerate(CONFIGS / f"{config}.yaml", *checked)
    found, wanted = everything(tmp_path / "out" / "checkpoint-4"), everything(plain)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    lines = (tmp_path / "logs" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 2, 4]
    record = json.loads((tmp_path / "out" / "checkpoint-best" / "validation.json").read_text())
    best = load_file(tmp_path / "out" / "checkpoint-best" / WEIGHTS)
    kept = load_file(tmp_path / "out" / f"checkpoint-{record['step']}" / WEIGHTS)
    assert best.keys() == kept.keys()
    assert all(torch.equal(best[name], kept[name]) for name in best)
