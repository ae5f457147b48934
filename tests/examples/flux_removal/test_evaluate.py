from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import moe_lora
import train
from flux_fill.models import Conditioner, load_checkpoint, load_pipeline
from options.parsing import parse_options

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, random_flux_fill: Path, triplets: Path
) -> Path:
    output = tmp_path_factory.mktemp("run")
    flags = ["--flux_fill_id", random_flux_fill, "--train_data_dir", triplets]
    flags += ["--output_dir", output, "--logging_dir", output / "logs", "--report_to", "none"]
    flags += ["--lora_r", 2, "--lora_alpha", 2, "--learning_rate", 0.1, "--max_train_steps", 2]
    flags += ["--enable_detail_loss", "--enable_mask_info"]
    return train.train(parse_options([str(flag) for flag in flags]))


@pytest.fixture
def run(random_flux_fill: Path, triplets: Path, tmp_path: Path) -> Callable[..., dict]:
    """Return a function that evaluates, in two steps of denoising, and reads what was written."""

    def evaluated(*flags: object) -> dict:
        given = ["--flux_fill_id", random_flux_fill, "--data_dir", triplets, "--steps", 2]
        evaluate.main([str(flag) for flag in [*given, "--output_dir", tmp_path / "out", *flags]])
        return json.loads((tmp_path / "out" / "metrics.json").read_text())

    return evaluated


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)) / 255


def test_numbers_are_those_of_the_images(
    run: Callable[..., dict],
    checkpoint: Path,
    triplets: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run("--checkpoint", checkpoint, "--base_model")
    assert set(found["psnr"]) == set(found["samples"]) == {"base", "trained"}
    for model, samples in found["samples"].items():
        assert [sample["stem"] for sample in samples] == [f"{i:03d}" for i in range(5)]
        inside = []
        for sample in samples:
            prediction, target, mask = (
                read(folder / f"{sample['stem']}.png")
                for folder in (
                    tmp_path / "out/images" / model,
                    triplets / "result",
                    triplets / "mask",
                )
            )
            error = ((prediction - target) ** 2)[mask > 0.5].mean()
            inside.append(-10 * np.log10(error))
            assert sample["psnr/inside"] == pytest.approx(inside[-1], abs=0.05)
            assert ("routing" in sample) == (model == "trained")
        assert found["psnr"][model]["inside"] == pytest.approx(np.mean(inside), abs=0.05)
    assert found["psnr"]["base"] != found["psnr"]["trained"]
    assert "gain" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "contact_sheet.png").height > 5 * 2 * 64


def test_surroundings_are_those_of_remove(
    run: Callable[..., dict], triplets: Path, tmp_path: Path
) -> None:
    """Every choice is measured as it is written, and the masks of the triplets are respected."""
    found, written = {}, {}
    for name, flags in {
        "prediction": ["--outside", "prediction"],
        "paste": ["--outside", "paste", "--feather", 0],
        "raw seam": ["--seam", 0],
        "keep": [],
    }.items():
        found[name] = run(*flags)
        written[name] = read(tmp_path / "out/images/base/000.png")
    source = read(triplets / "src" / "000.png")
    inside = read(triplets / "mask" / "000.png") > 0.5
    assert np.array_equal(written["paste"][~inside], source[~inside])
    assert np.array_equal(written["paste"][inside], written["prediction"][inside])
    assert np.array_equal(written["raw seam"][inside], written["prediction"][inside])
    assert not np.array_equal(written["keep"][inside], written["prediction"][inside])
    assert np.array_equal(written["keep"][~inside], written["raw seam"][~inside])
    assert (found["keep"]["outside"], found["keep"]["seam"]) == ("keep", 0.5)
    assert len({tuple(each["psnr"]["base"].values()) for each in found.values()}) == 4


def test_the_base_model_is_measured_alone(
    run: Callable[..., dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("--rows", 1)
    assert set(found["psnr"]) == {"base"}
    assert "specialization" not in found
    assert "gain" not in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "contact_sheet.png").height < 2 * (2 * 64)


def test_prompts_are_encoded_before_the_transformer_is_loaded(
    run: Callable[..., dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    class Watched(Conditioner):
        def __init__(self, pipe: Any, **settings: Any) -> None:
            devices.extend({p.device.type for p in pipe.transformer.parameters()})
            super().__init__(pipe, **settings)

    monkeypatch.setattr(evaluate, "Conditioner", Watched)
    run("--checkpoint", "none")
    assert devices == ["meta"]


def test_none_is_the_base_model(run: Callable[..., dict]) -> None:
    assert set(run("--checkpoint", "none")["psnr"]) == {"base"}


def test_plain_loras_are_measured_from_folders_and_files(
    run: Callable[..., dict], checkpoint: Path, random_flux_fill: Path, tmp_path: Path
) -> None:
    expert = checkpoint / "experts" / "removal_expert"
    of_folder = run("--checkpoint", expert, "--base_model")["psnr"]
    pipe = load_pipeline(str(random_flux_fill))
    load_checkpoint(pipe, checkpoint)
    alone = torch.tensor([1.0, 0.0, 0.0])
    moe_lora.export_lora(pipe.transformer, tmp_path / "expert.safetensors", weights=alone)
    of_file = run("--checkpoint", tmp_path / "expert.safetensors")["psnr"]
    assert of_file["trained"] == pytest.approx(of_folder["trained"], abs=1e-3)
    assert of_file["trained"]["whole"] != pytest.approx(of_folder["base"]["whole"], abs=1e-3)


def test_a_manifest_is_measured_with_its_captions(
    run: Callable[..., dict],
    triplets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifest, asked = tmp_path / "manifest.jsonl", list[int]()
    lines = [
        {part: str(triplets / part / f"{index:03d}.png") for part in ("src", "mask", "result")}
        | ({"caption": caption} if caption else {})
        for index, caption in enumerate(["sea", "", "wall"])
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    build = Conditioner.__init__

    def note(self: Conditioner, *given: Any, captions: Any = (), **more: Any) -> None:
        assert captions == ["sea", "wall"]
        build(self, *given, **more)

    def embed(self: Conditioner, ref: torch.Tensor, caption: torch.Tensor) -> Any:
        asked.extend(caption.tolist())
        return self.embeds.expand(len(ref), -1, -1), self.pooled.expand(len(ref), -1)

    monkeypatch.setattr(Conditioner, "__init__", note)
    monkeypatch.setattr(Conditioner, "__call__", embed)
    found = run("--data_dir", manifest)
    assert len(found["samples"]["base"]) == 3
    assert sorted(asked) == [-1, 0, 1]


def test_broken_samples_raise_before_the_model_is_loaded_or_are_left_out(
    run: Callable[..., dict], triplets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    shutil.copytree(triplets, data)
    (data / "result" / "001.png").write_bytes(b"broken")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
        with pytest.raises(ValueError, match=r"001"):
            run("--data_dir", data)
    found = run("--data_dir", data, "--skip_broken")
    assert [sample["stem"] for sample in found["samples"]["base"]] == ["000", "002", "003", "004"]


def test_experts_are_ablated_by_the_losses_of_the_files(
    run: Callable[..., dict], checkpoint: Path, tmp_path: Path
) -> None:
    config = tmp_path / "losses.yaml"
    config.write_text("enable_detail_loss: true\nenable_mask_info: true\nmax_sigma: 1.0\n")
    found = run("--checkpoint", checkpoint, "--ablate_experts", config)["specialization"]
    assert {"base", "detail", "psnr/inside"} < set(found["baseline"])
    assert {"boundary", "consistency"}.isdisjoint(found["baseline"])
    assert len(found["rises"]) == 3


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--base_model"], "need --checkpoint"),
        (["--steps", "0"], "--steps to be >= 1, but got 0"),
        (["--rows", "0"], "--rows to be >= 1, but got 0"),
        (["--background", "no color"], "`background` to be a color"),
    ],
)
def test_options_without_effect_are_refused(
    flags: list[str], told: str, run: Callable[..., dict], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(*flags)
    assert told in capsys.readouterr().err
