from __future__ import annotations

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import tiny_flux_fill

import moe_lora
from moe_lora.export.expert_table import table_of_model
from moe_lora.export.merge_into_files import merge_into_files

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])


@pytest.fixture
def lora(flux):
    return table_of_model(flux).mixed(WEIGHTS)


@torch.no_grad()
def output(model, inputs):
    return model(**inputs)[0]


@pytest.mark.parametrize("shard_size", ["10GB", "100KB"])
def test_the_merged_model_gives_the_mixture(
    flux, lora, make_flux, make_flux_inputs, tmp_path, shard_size
):
    make_flux().save_pretrained(tmp_path / "base", max_shard_size=shard_size)
    before = {p: p.read_bytes() for p in (tmp_path / "base").iterdir()}
    files = merge_into_files(lora, tmp_path / "base", tmp_path / "out")
    assert (len(files) > 1) == (shard_size == "100KB")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in before)
    assert all(p.read_bytes() == content for p, content in before.items())
    merged = FluxTransformer2DModel.from_pretrained(tmp_path / "out").eval()
    with moe_lora.route(flux, WEIGHTS):
        expected = output(flux, make_flux_inputs())
    torch.testing.assert_close(output(merged, make_flux_inputs()), expected, rtol=1e-5, atol=1e-5)


def test_a_pipeline_is_copied_with_its_transformer_merged(lora, make_flux, tmp_path):
    pipe = tiny_flux_fill(transformer=make_flux(), vae=None)
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "transformer" / "diffusion_pytorch_model.bin").touch()
    files = merge_into_files(lora, tmp_path / "base", tmp_path / "out", "FluxTransformer2DModel")
    assert files == [tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors"]
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").is_file()
    # It would hold the unmerged weights.
    assert not (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.bin").exists()
    base, merged = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("base", "out")
    )
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed == {f"{path}.weight" for path in lora}


def test_the_dtype_of_the_base_stays(lora, make_flux, tmp_path):
    make_flux().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    merge_into_files(lora, tmp_path / "base", tmp_path / "out")
    base, merged = (
        load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")["x_embedder.weight"]
        for name in ("base", "out")
    )
    expected = (base.float() + lora["x_embedder"].delta()).bfloat16()
    assert torch.equal(merged, expected)


class TestFaults:
    def check(self, lora, tmp_path, error, message, **kwargs):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=message):
            merge_into_files(lora, tmp_path / "base", tmp_path / "out", **kwargs)
        assert sorted(tmp_path.rglob("*")) == before

    def test_another_width(self, lora, make_flux, tmp_path):
        make_flux(64).save_pretrained(tmp_path / "base")
        self.check(
            lora, tmp_path, ValueError, r"'x_embedder'.*shape \(32, 384\), but got \(32, 64\)"
        )

    def test_another_class(self, lora, make_flux, tmp_path):
        make_flux().save_pretrained(tmp_path / "base")
        message = "Expected a SD3Transformer2DModel"
        self.check(lora, tmp_path, ValueError, message, base_class="SD3Transformer2DModel")

    def test_a_layer_that_is_missing(self, lora, make_flux, tmp_path):
        make_flux().save_pretrained(tmp_path / "base")
        lora["nowhere"] = lora["x_embedder"]
        self.check(lora, tmp_path, ValueError, "it has no 'nowhere'")

    def test_no_model(self, lora, tmp_path):
        (tmp_path / "base").mkdir()
        self.check(lora, tmp_path, FileNotFoundError, "Expected one diffusers model")
        (tmp_path / "base" / "config.json").write_text("{}")
        self.check(lora, tmp_path, FileNotFoundError, "Expected safetensors files")

    def test_a_truncated_shard(self, lora, make_flux, tmp_path):
        make_flux().save_pretrained(tmp_path / "base")
        file = tmp_path / "base" / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
        self.check(lora, tmp_path, ValueError, "truncated, corrupt")

    def test_quantized_weights(self, lora, tmp_path):
        (tmp_path / "base").mkdir()
        (tmp_path / "base" / "config.json").write_text(json.dumps({"_class_name": "X"}))
        only = {"x_embedder": lora["x_embedder"]}
        weight = torch.zeros(32, 384, dtype=torch.int8)
        save_file({"x_embedder.weight": weight}, tmp_path / "base" / "a.safetensors")
        self.check(only, tmp_path, ValueError, "but got I8")

    def test_nan(self, lora, make_flux, tmp_path):
        make_flux().save_pretrained(tmp_path / "base")
        lora["x_embedder"].up.fill_(float("inf"))
        self.check(lora, tmp_path, ValueError, "'x_embedder' gives NaN or inf")

    def test_a_place_that_is_taken(self, lora, make_flux, tmp_path):
        make_flux().save_pretrained(tmp_path / "base")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        self.check(lora, tmp_path, ValueError, "is taken")
        with pytest.raises(ValueError, match="Expected a folder outside"):
            merge_into_files(lora, tmp_path / "base", tmp_path / "base" / "inside")


def test_merging_a_trained_peft_model_is_the_same_as_merging_its_files(
    make_mlp, mixed_config, tmp_path
):
    model = get_peft_model(make_mlp(), mixed_config(target_modules=["first"], rank_pattern={}))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    state = make_mlp().state_dict()
    save_file(state, tmp_path / "base" / "a.safetensors", {"format": "pt", "kept": "yes"})
    merge_into_files(table_of_model(model).mixed(WEIGHTS), tmp_path / "base", tmp_path / "out")
    moe_lora.merge(model, WEIGHTS)
    merged = load_file(tmp_path / "out" / "a.safetensors")
    torch.testing.assert_close(merged["first.weight"], model.base_model.model.first.weight)
    assert torch.equal(merged["second.weight"], state["second.weight"])
