from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import demo
import train
from evaluation.measuring import REGIONS

pytestmark = pytest.mark.slow

SMALL = """
flux_fill_id: {model}
lora_r: 2
lora_alpha: 2
batch_size: 2
max_train_steps: 900
uniform_steps: 500
enable_boundary_loss: true
enable_consistency_loss: true
enable_detail_loss: true
enable_mask_info: true
"""


def figures_in(folder: Path) -> set[str]:
    """Return the names of the figures in TensorBoard's event files."""
    found: set[str] = set()
    for file in folder.rglob("events.*"):
        found |= set(EventAccumulator(str(file)).Reload().Tags()["images"])
    return found


def test_an_interrupted_demo_goes_on_by_the_flag_that_it_names(
    random_flux_fill: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, output = tmp_path / "small.yaml", tmp_path / "demo"
    config.write_text(SMALL.format(model=random_flux_fill))
    flags = ["--quick", "--config", str(config), "--output_dir", str(output)]
    step = train.training_step

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    class TrainedError(Exception):
        """End the demo once it has trained."""

    def stop(*arguments: Any) -> None:
        raise TrainedError

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", interrupted)
        assert demo.main(flags) == 1
    advised = re.search(r"--resume_from_checkpoint latest", capsys.readouterr().out)
    monkeypatch.setattr(demo, "evaluate", stop)  # all that follows is the same in every demo
    with pytest.raises(TrainedError):
        demo.main([*flags, *advised[0].split()])
    assert (output / "checkpoint" / "adapter_model.safetensors").is_file()
    lines = (output / "logs" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_the_quick_demo_leaves_all_that_it_promises(
    random_flux_fill: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, output = tmp_path / "small.yaml", tmp_path / "demo"
    config.write_text(SMALL.format(model=random_flux_fill))
    for _ in range(2):
        assert demo.main(["--quick", "--config", str(config), "--output_dir", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "PSNR, dB" in printed
    assert "diagonal share" in printed
    assert (output / "contact_sheet.png").stat().st_size > 1000
    figures = [
        "routing_by_edge_complexity",
        "routing_by_mask_size",
        "routing_over_training",
        "specialization",
    ]
    for name in figures:
        assert Image.open(output / f"{name}.png").width >= 800
    assert figures_in(output / "logs") == {
        *(f"test/{name}" for name in figures),
        *(f"routing/{name}" for name in ("edge_complexity", "mask_size", "sigma", "usage")),
    }
    checkpoint = output / "checkpoint"
    assert PeftConfig.from_pretrained(checkpoint).router == "three_expert_removal"
    assert len(list((checkpoint / "experts").iterdir())) == 3
    log = (output / "logs" / "training.log").read_text()
    assert log.count("Expert Usage: ") == log.count("Component Losses: ") == 6
    assert list((output / "logs").rglob("events.*"))
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["psnr"]) == ["base", "raw", "ours"]
    assert all(column.keys() == set(REGIONS) for column in metrics["psnr"].values())
    assert metrics["psnr"]["raw"]["outside"] != metrics["psnr"]["ours"]["outside"]
    assert set(metrics["seconds"]) == {
        *("data", "training", "evaluation", "specialization", "figures")
    }
    found = metrics["specialization"]
    losses = {"base", "boundary", "consistency", "detail"}
    regions = {"psnr/inside", "psnr/outside", "psnr/boundary", "psnr/effect"}
    assert set(found["baseline"]) == losses | regions
    assert len(found["rises"]) == 3
    assert 0 <= found["score"] <= 1
    assert metrics["samples"] == 6
