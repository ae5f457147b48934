from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from two_processes import run_in_two_processes

import train
from flux_fill.models import load_checkpoint, load_pipeline
from options.parsing import parse_options
from training_run.checkpoints import load_model
from training_run.parts import build_model

pytestmark = pytest.mark.slow


def test_two_processes_train_both_phases_and_save_plain_files(
    arguments: Callable[..., list[str]],
    all_losses: dict[str, Any],
    random_flux_fill: Path,
    tmp_path: Path,
) -> None:
    flags = arguments(**all_losses, uniform_steps=1, max_train_steps=3, batch_size=1)
    run_in_two_processes(train.__file__, *flags)
    folder = tmp_path / "out" / "checkpoint-3"
    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        assert not [name for name in tensors if "module." in name.replace("base_model.", "")]
        assert all(tensor.numel() for tensor in tensors.values())
    states = sorted(path.name for path in (folder / "training_state").iterdir())
    assert states == ["optimizer.safetensors", "state.json"]
    pipe = load_pipeline(str(random_flux_fill))
    assert load_model(build_model(pipe, parse_options(flags)), folder) == []
    load_checkpoint(load_pipeline(str(random_flux_fill)), folder)
    log = (tmp_path / "logs" / "training.log").read_text()
    assert len(re.findall(r"Step \d/3", log)) == 3
    assert "Strategy: uniform" in log
    assert "Strategy: soft" in log
