from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxFillPipeline
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_models import TEXT_PARTS

import train
from options.parsing import parse_options
from training_run.model_card import ModelCardWriter, Validated, changed_options, license_of

Arguments = Callable[..., list[str]]
DATA = ["--train_data_dir", "some/where/photos"]


def write(folder: Path, *flags: str, validated: bool = False, **more: Any) -> ModelCard:
    folder.mkdir(exist_ok=True)
    writer = ModelCardWriter(parse_options([*DATA, *flags]), "9 triplets.", 100, **more)
    if validated:
        sheet = folder.parent / "sheet.png"
        Image.new("RGB", (4, 4)).save(sheet)
        writer.validated = Validated(40, {"loss": 0.25, "psnr/inside": 21.5}, sheet, 6)
    writer(folder, 50)
    return ModelCard.load(folder / "README.md")


FILL = "black-forest-labs/FLUX.1-Fill-dev"


def test_the_metadata_are_those_of_the_hub(tmp_path: Path) -> None:
    data = write(
        tmp_path / "card", "--flux_fill_id", FILL, "--train_data_dir", "datasets:me/objects"
    ).data.to_dict()
    assert data["base_model"] == FILL
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "image-to-image"
    assert data["datasets"] == ["me/objects"]
    assert {"moe-lora", "lora", "inpainting"} <= set(data["tags"])
    assert (data["license"], data["license_name"]) == ("other", "flux-1-dev-non-commercial-license")
    assert data["license_link"].startswith(f"https://huggingface.co/{FILL}/")
    assert "model-index" not in data


def test_a_folder_is_no_base_model_of_the_hub(tmp_path: Path) -> None:
    card = write(tmp_path / "card")
    assert "base_model" not in card.data.to_dict()
    assert str(Path(train.__file__).parents[2]) not in card.content


@pytest.mark.parametrize(
    ("base", "given", "license"),
    [
        (None, None, "unknown"),
        ("someone/else", None, "unknown"),
        (FILL, None, "other"),
        (FILL, "apache-2.0", "apache-2.0"),
        ("black-forest-labs/FLUX.1-schnell", None, "unknown"),
    ],
)
def test_the_license(base: str | None, given: str | None, license: str) -> None:
    assert license_of(base, given)["license"] == license


def test_validations_are_in_text_metadata_and_picture(tmp_path: Path) -> None:
    card = write(tmp_path / "card", validated=True)
    assert "At step 40, on 6 held-out scenes" in card.text
    assert "| psnr/inside | 21.5000 |" in card.text
    assert "(contact_sheet.png)" in card.text
    assert Image.open(tmp_path / "card" / "contact_sheet.png").size == (4, 4)
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found["psnr/inside"].metric_value == 21.5
    assert found["psnr/inside"].metric_type == "psnr"


def test_without_a_validation_there_is_no_picture(tmp_path: Path) -> None:
    card = write(tmp_path / "card")
    assert "contact_sheet" not in card.text
    assert [path.name for path in (tmp_path / "card").iterdir()] == ["README.md"]


def test_options_that_were_changed_are_listed_without_paths(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    flags = ["--train_data_dir", str(photos), "--lora_r", "7", "--target_modules", "to_q", "to_k"]
    options = parse_options([*flags, "--output_dir", "secret", "--prompt", "a|b"])
    rows = changed_options(options).splitlines()
    assert "| `lora_r` | 7 |" in rows
    assert '| `target_modules` | ["to\\_q", "to\\_k"] |' in rows
    assert "| `prompt` | a\\|b |" in rows
    assert "| `train_data_dir` | photos |" in rows
    assert not any("lora_alpha" in row or "secret" in row for row in rows)


def code_blocks(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{"routing": "always"}, {"adapter": "lora"}, {"use_lora": False}],
    ids=["mixture", "plain lora", "whole transformer"],
)
def test_the_code_of_the_card_loads_the_checkpoint(
    changed: dict[str, Any],
    arguments: Arguments,
    random_flux_fill: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = train.train(parse_options(arguments(**changed)))
    card = ModelCard.load(folder / "README.md")
    assert "Model Card for Model ID" not in card.content
    load, call = code_blocks(card)
    assert f'"{random_flux_fill.name}"' in load
    monkeypatch.chdir(folder)
    without_texts = partial(FluxFillPipeline.from_pretrained, **dict.fromkeys(TEXT_PARTS))
    monkeypatch.setattr(FluxFillPipeline, "from_pretrained", without_texts)
    names: dict[str, Any] = {}
    exec(load.replace(f'"{random_flux_fill.name}"', repr(str(random_flux_fill))), names)
    found = names["pipe"].transformer.state_dict()
    (file,) = [*folder.glob("adapter_model.safetensors"), *folder.glob("transformer/*.safetensors")]
    saved = load_file(file)
    assert saved
    for name, value in saved.items():
        key = name.removeprefix("base_model.model.")
        (loaded,) = [v for k, v in found.items() if k.replace(".default", "") == key]
        torch.testing.assert_close(loaded.float(), value.float(), rtol=1e-2, atol=1e-3)
    given: dict[str, Any] = {}
    monkeypatch.setattr(FluxFillPipeline, "__call__", lambda self, **k: given.update(k) or self)
    names["pipe"].images = [None]
    monkeypatch.setattr("diffusers.utils.load_image", lambda _: Image.new("RGB", (32, 16)))
    exec(call, names)
    assert (given["width"], given["height"], given["prompt"]) == (32, 16, "")


def test_an_uploaded_checkpoint_is_loaded_from_its_repository(tmp_path: Path) -> None:
    card = write(tmp_path / "card", repository="me/remover")
    load, _ = code_blocks(card)
    assert 'snapshot_download("me/remover")' in load
    assert card.text.lstrip().startswith("# remover\n")


def test_redux_is_the_prompt_where_it_was_in_training(tmp_path: Path) -> None:
    card = write(tmp_path / "card", "--flux_redux_id", "black-forest-labs/FLUX.1-Redux-dev")
    _, call = code_blocks(card)
    assert 'from_pretrained("black-forest-labs/FLUX.1-Redux-dev")' in call
    assert "**prompt" in call
    compile(call, "card", "exec")
