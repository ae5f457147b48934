from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from options.parsing import parse_options

SCRIPT = Path(train.__file__).with_name("train_moe.sh")


def call(cwd: Path, *arguments: object, path: Path, **variables: str) -> None:
    """Run the script with the commands of a folder before all others."""
    clean = {k: v for k, v in os.environ.items() if k not in ("TRAIN_DATA_DIR", "OUTPUT_DIR")}
    environment = clean | variables | {"PATH": f"{path}:{os.environ['PATH']}"}
    words = ["bash", str(SCRIPT), *map(str, arguments)]
    subprocess.run(words, cwd=cwd, env=environment, check=True, timeout=600)


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """Return a folder with an `accelerate` that notes its directory and arguments."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "accelerate"
    command.write_text(f'#!/bin/sh\npwd > {folder}/told\nprintf "%s\\n" "$@" >> {folder}/told\n')
    command.chmod(0o755)
    return folder


def told(recorder: Path) -> tuple[Path, list[str]]:
    directory, *words = (recorder / "told").read_text().splitlines()
    assert words[:2] == ["launch", "train.py"]
    return Path(directory), words[2:]


def test_data_is_looked_up_where_the_script_is_called(recorder: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    call(tmp_path, "data/train", "--max_train_steps", 7, path=recorder)
    directory, flags = told(recorder)
    assert directory == SCRIPT.parent
    options = parse_options(flags)
    assert options.train_data_dir == str(tmp_path / "data" / "train")
    assert options.max_train_steps == 7
    assert options.routed
    assert (options.num_experts, options.lora_r, options.lora_alpha) == (3, 256, 256)


def test_other_data_is_looked_up_beside_the_script(recorder: Path, tmp_path: Path) -> None:
    call(tmp_path, "configs", path=recorder)
    assert parse_options(told(recorder)[1]).train_data_dir == "configs"
    call(tmp_path, "--seed", 3, path=recorder, TRAIN_DATA_DIR="configs", OUTPUT_DIR="mine")
    options = parse_options(told(recorder)[1])
    assert (options.train_data_dir, options.output_dir, options.seed) == ("configs", "mine", 3)


@pytest.mark.slow
def test_the_script_trains(triplets: Path, random_flux_fill: Path, tmp_path: Path) -> None:
    call(
        triplets.parent,
        *(triplets.name, "--flux_fill_id", random_flux_fill, "--max_train_steps", 1),
        *("--lora_r", 2, "--lora_alpha", 2),
        path=Path(sys.executable).parent,
        OUTPUT_DIR=str(tmp_path / "out"),
        LOGGING_DIR=str(tmp_path / "logs"),
    )
    assert (tmp_path / "out" / "checkpoint-1" / "adapter_model.safetensors").is_file()
    assert "Expert Usage" in (tmp_path / "logs" / "training.log").read_text()
