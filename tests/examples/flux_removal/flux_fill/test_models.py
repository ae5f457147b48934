from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny_models import tiny_flux, tiny_flux_fill
from torch import nn

from flux_fill import models
from flux_fill.models import Conditioner, add_experts, guidance_for, load_checkpoint, load_pipeline
from options.parsing import parse_options
from options.train_options import BUNDLED_MODEL


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no/such/model"):
        load_pipeline("no/such/model")


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load_pipeline(str(tmp_path))


def test_another_flux_is_refused(tmp_path: Path) -> None:
    tiny_flux_fill(transformer=tiny_flux(64)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="384 input channels"):
        load_pipeline(str(tmp_path))


def test_a_pipeline_is_frozen_and_of_the_wanted_dtype(random_flux_fill: Path) -> None:
    pipe = load_pipeline(str(random_flux_fill), dtype=torch.bfloat16)
    for module in (pipe.transformer, pipe.vae):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["to_q"], {"to_q"}),
        (["attn.to_q", "attn.to_k"], {"to_q", "to_k"}),
        ([r".*single_transformer_blocks\.0\.attn\.to_[qv]"], {"to_q", "to_v"}),
    ],
)
def test_targets_are_names_or_one_regex(
    targets: list[str], adapted: set[str], random_flux_fill: Path
) -> None:
    options = parse_options(
        ["--train_data_dir", "d", "--lora_r", "2", "--target_modules", *targets]
    )
    model = add_experts(load_pipeline(str(random_flux_fill)).transformer, options, routed=False)
    found = {name.split(".moe_lora")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rsplit(".", 1)[-1] for name in found} == adapted


def test_all_linear_is_a_word_of_peft(random_flux_fill: Path) -> None:
    flags = ["--train_data_dir", "d", "--lora_r", "2", "--target_modules", "all-linear"]
    pipe = load_pipeline(str(random_flux_fill))
    linear = sum(isinstance(module, nn.Linear) for module in pipe.transformer.modules())
    model = add_experts(pipe.transformer, parse_options(flags), routed=False)
    adapted = [name for name, _ in model.named_parameters() if name.endswith("lora_A")]
    assert linear - 1 <= len(adapted) <= linear


def test_guidance(random_flux_fill: Path, guided_flux_fill: Path) -> None:
    plain = load_pipeline(str(random_flux_fill)).transformer
    guided = load_pipeline(str(guided_flux_fill)).transformer
    assert guidance_for(plain, None, 2) is None
    assert guidance_for(guided, None, 2).tolist() == [30.0, 30.0]
    assert guidance_for(guided, 3.5, 1).tolist() == [3.5]
    with pytest.raises(ValueError, match="no guidance embedding"):
        guidance_for(plain, 3.5, 1)


def test_without_encoders_the_prompt_is_zero(random_flux_fill: Path) -> None:
    embeds, pooled = Conditioner(load_pipeline(str(random_flux_fill)))(torch.rand(3, 3, 16, 16))
    assert torch.equal(embeds, torch.zeros(3, 1, 8))
    assert torch.equal(pooled, torch.zeros(3, 8))


def test_a_prompt_that_nothing_can_read_raises(random_flux_fill: Path) -> None:
    with pytest.raises(ValueError, match="no text encoders"):
        Conditioner(load_pipeline(str(random_flux_fill)), prompt="a lawn")


@pytest.mark.parametrize(("prompt", "read"), [(None, ""), ("a lawn", "a lawn")])
def test_text_encoders_are_asked_once_and_dropped(
    prompt: str | None, read: str, random_flux_fill: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(str(random_flux_fill))
    pipe.register_modules(text_encoder=nn.Linear(1, 1), text_encoder_2=nn.Linear(1, 1))
    asked = []

    def encode_prompt(text: str, **kwargs: object) -> tuple[torch.Tensor, ...]:
        asked.append(text)
        return torch.full((1, 5, 8), 2.0), torch.full((1, 8), 3.0), torch.zeros(5, 3)

    monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
    conditioner = Conditioner(pipe, prompt=prompt)
    for _ in range(2):
        embeds, pooled = conditioner(torch.rand(2, 3, 16, 16))
    assert asked == [read]
    assert torch.equal(embeds, torch.full((2, 5, 8), 2.0))
    assert torch.equal(pooled, torch.full((2, 8), 3.0))
    assert pipe.text_encoder is None
    assert pipe.text_encoder_2 is None


def test_every_sample_is_given_its_caption(
    random_flux_fill: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_pipeline(str(random_flux_fill))
    pipe.register_modules(text_encoder=nn.Linear(1, 1), text_encoder_2=nn.Linear(1, 1))

    def encode_prompt(text: str, **kwargs: object) -> tuple[torch.Tensor, ...]:
        length = float(len(text))
        return torch.full((1, 5, 8), length), torch.full((1, 8), -length), torch.zeros(5, 3)

    monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
    conditioner = Conditioner(pipe, prompt="four", captions=["a", "bc"])
    embeds, pooled = conditioner(torch.rand(3, 3, 16, 16), torch.tensor([1, -1, 0]))
    assert embeds[:, 0, 0].tolist() == [2.0, 4.0, 1.0]
    assert pooled[:, 0].tolist() == [-2.0, -4.0, -1.0]
    assert conditioner(torch.rand(1, 3, 16, 16))[0].unique().tolist() == [4.0]


def test_redux_encodes_every_reference_by_itself(redux: Path, random_flux_fill: Path) -> None:
    conditioner = Conditioner(load_pipeline(str(random_flux_fill)), redux_id=str(redux))
    ref = torch.rand(2, 3, 48, 64)
    embeds, pooled = conditioner(ref)
    assert embeds.shape == (2, 512 + 4, 4096)
    assert pooled.shape == (2, 768)
    assert not torch.equal(embeds[0], embeds[1])
    for i in range(2):
        torch.testing.assert_close(conditioner(ref[i : i + 1])[0], embeds[i : i + 1])


def test_redux_sees_the_reference_in_its_own_range(redux: Path, random_flux_fill: Path) -> None:
    conditioner = Conditioner(load_pipeline(str(random_flux_fill)), redux_id=str(redux))
    seen = []
    conditioner.redux.image_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    conditioner(torch.ones(1, 3, 32, 32))
    assert seen[0].max().item() == pytest.approx(1.0)
    conditioner(torch.zeros(1, 3, 32, 32))
    assert seen[1].max().item() == pytest.approx(-1.0)


def test_a_prompt_beside_redux_raises(redux: Path, random_flux_fill: Path) -> None:
    with pytest.raises(ValueError, match="Redux is the prompt"):
        Conditioner(load_pipeline(str(random_flux_fill)), prompt="a", redux_id=str(redux))


def test_images_are_rounded() -> None:
    image = models.to_pil_images(torch.tensor([0.0, 0.5, 2.0]).view(1, 3, 1, 1))[0]
    assert np.array(image).tolist() == [[[0, 128, 255]]]


def test_a_folder_that_is_no_checkpoint_raises(random_flux_fill: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(random_flux_fill))
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_checkpoint(pipe, tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_checkpoint(pipe, tmp_path / "missing")


def test_router_parameters_are_those_of_the_router(random_flux_fill: Path) -> None:
    options = parse_options(["--train_data_dir", "d", "--lora_r", "2", "--target_modules", "to_q"])
    model = add_experts(load_pipeline(str(random_flux_fill)).transformer, options, routed=True)
    found = {id(p) for p in models.router_parameters(model)}
    named = {name for name, p in model.named_parameters() if id(p) in found}
    assert named == {name for name, _ in model.named_parameters() if "moe_router" in name}
    assert isinstance(model, PeftModel)


def test_the_bundled_model_loads() -> None:
    pipe = load_pipeline(str(BUNDLED_MODEL))
    index = json.loads((BUNDLED_MODEL / "model_index.json").read_text())
    assert index["_class_name"] == "FluxFillPipeline"
    assert pipe.transformer.config.in_channels == 384
