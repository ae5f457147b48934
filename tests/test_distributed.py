"""Adapted models over two processes, on the CPU; tests/distributed/worker.py is what these run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import moe_lora

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parent / "distributed" / "worker.py"
SCENARIOS = [
    "ddp-flux",
    "ddp-net",
    "ddp-views",
    "ddp-accumulation",
    "ddp-checkpointing",
    "ddp-passes-that-differ",
    "ddp-cold-experts",
    "ddp-saving",
    "accelerate",
    "fsdp-flux",
    "fsdp-net",
    "fsdp-cold-experts",
    "fsdp-saving",
    "fsdp-mixed-precision",
    "fsdp-shards",
]
FROZEN = ["ddp-frozen-experts", "fsdp-frozen-experts"]


def launch(folder: Path, names: list[str]) -> str:
    # `--standalone` takes a free port by itself.
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [sys.executable, *command, str(WORKER), str(folder), *names],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture
def prepared(
    folder: Path,
    make_flux: Callable[..., Any],
    make_flux_inputs: Callable[..., Any],
    flux_targets: list[str],
) -> Path:
    if not (folder / "targets.json").exists():
        make_flux().save_pretrained(folder / "flux")
        save_file(make_flux_inputs(batch=2), folder / "inputs.safetensors")
        (folder / "targets.json").write_text(json.dumps(flux_targets))
    return folder


@pytest.fixture
def report_of(prepared: Path) -> Callable[[str], dict[str, Any]]:
    def report_of(name: str, names: list[str] = SCENARIOS) -> dict[str, Any]:
        log = prepared / f"{names[0]}.log"
        if not log.exists():
            log.touch()  # launch once, even if that takes too long
            log.write_text(launch(prepared, names))
        for failure in prepared.glob("*.json"):
            told = json.loads(failure.read_text())
            if isinstance(told, dict) and "failed" in told and failure.stem.startswith(name):
                pytest.fail(f"{failure.stem}: {told['failed']}")
        path = prepared / f"{name}.0.json"
        assert path.exists(), log.read_text()[-3000:]
        report: dict[str, Any] = json.loads(path.read_text())
        return report

    return report_of


TRAINED_ALIKE = [
    "ddp-flux",
    "ddp-net",
    "ddp-views",
    "ddp-accumulation",
    "ddp-checkpointing",
    "accelerate",
    "fsdp-flux",
    "fsdp-net",
]


@pytest.mark.parametrize("name", TRAINED_ALIKE)
def test_two_processes_train_like_one_through_phases_that_ask_no_router(report_of, name):
    report = report_of(name)
    assert report["loss"] < 1e-5
    assert report["gradient"] < 1e-5
    assert report["none_in_one"] == []
    assert report["router_steps"] == 2
    assert report["parameter"] < 1e-3  # AdamW turns the noise of tiny gradients into steps


@pytest.mark.parametrize("part", ["base", "adapter", "gradients", "optimizer"])
def test_a_plan_counts_the_shard_of_a_process(report_of, part):
    report = report_of("fsdp-shards")
    assert report[part] == pytest.approx(report["plan"][part], rel=1e-6)
    assert report["plan"]["gathered"] > 0


def test_processes_whose_passes_differ_end_with_the_same_gradients(report_of):
    report = report_of("ddp-passes-that-differ")
    assert report["gradient"] < 1e-5
    assert report["none_in_one"] == []


@pytest.mark.parametrize("name", ["ddp-cold-experts", "fsdp-cold-experts"])
def test_experts_that_no_token_chooses_get_zero_gradients(report_of, name):
    report = report_of(name)
    assert report["loss"] < 1e-5
    assert report["gradient"] < 1e-5
    assert all(gradient > 0 for gradient in report["by_expert"][:2])
    assert report["by_expert"][4:] == [0.0, 0.0]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_what_two_processes_save_is_whole_and_one_loads_it(
    report_of, prepared, make_flux, make_flux_inputs, wrapper
):
    report = report_of(f"{wrapper}-saving")
    folder = prepared / f"saved_{wrapper}"
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.manual_seed(1)
    model = PeftModel.from_pretrained(make_flux(), folder).eval()
    names = {name.replace(".default.", ".").removesuffix(".default") for name in report["keys"]}
    assert set(tensors) == {name for name in names if "moe_lora_" in name}
    assert not [name for name in report["keys"] if name.startswith("module.")]
    assert all(tensor.numel() > 0 for tensor in tensors.values())
    expected = torch.load(prepared / f"output_{wrapper}.pt", weights_only=True)
    torch.testing.assert_close(model(**make_flux_inputs(batch=2))[0], expected)
    assert moe_lora.current_routing(model) is not None


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_resumed_step_is_that_of_the_uninterrupted_run(report_of, wrapper):
    assert report_of(f"{wrapper}-saving")["resumed"] < 1e-6


def test_accelerate_gives_names_without_a_prefix(report_of):
    keys = report_of("accelerate")["keys"]
    assert all(name.startswith("base_model.model.") for name in keys)


def test_a_router_in_a_unit_of_its_own_stays_in_float32(report_of):
    report = report_of("fsdp-mixed-precision")
    assert report == {"router": ["torch.float32"], "output": "torch.bfloat16", "missing": []}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_experts_stay_to_the_last_bit_and_runs_resume(
    report_of, prepared, make_flux, make_flux_inputs, name
):
    report = report_of(name, FROZEN)
    assert report["frozen"]
    assert report["least_moved"] > 1e-5
    assert report["loss"] < 1e-5
    assert report["resumed"] < 1e-6
    assert ("DistributedDataParallel" if name.startswith("ddp") else "sharded") in report["refused"]
    folder = prepared / f"frozen_{name.partition('-')[0]}"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors if "moe_lora_experts" in name} == {
        "lora_A",
        "lora_B",
    }
    model = PeftModel.from_pretrained(make_flux(), folder)
    assert model.peft_config["default"].experts[3:] == ("shadow",)
    assert model(**make_flux_inputs(batch=2))[0].isfinite().all()


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_like_one_process(report_of, stage):
    assert report_of(f"deepspeed-{stage}", ["deepspeed-2", "deepspeed-3"])["loss"] < 1e-5
