from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe_lora import MoELoraConfig, save_adapter
from moe_lora.checkpoint_reader import is_checkpoint
from moe_lora.export.expert_table import table_of_checkpoint, table_of_model
from moe_lora.tuner.state_dict.stored import input_width


@pytest.fixture
def checkpoint(flux, tmp_path):
    flux.save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_alone_tells_what_the_model_does(flux, checkpoint):
    of_model = table_of_model(flux)
    of_files, router = table_of_checkpoint(checkpoint)
    assert of_files.layers.keys() == of_model.layers.keys()
    for path, (lora_A, lora_B, scaling) in of_model.layers.items():
        assert torch.equal(of_files.layers[path].lora_A, lora_A)
        assert torch.equal(of_files.layers[path].lora_B, lora_B)
        assert of_files.layers[path].scaling == scaling
    assert len({experts.scaling for experts in of_model.layers.values()}) == 3
    assert of_files.names == of_model.names
    assert of_files.in_channels == of_model.in_channels == 384
    assert of_files.base_class == of_model.base_class == "FluxTransformer2DModel"
    assert "rules.strengths" in router


def of_our_own(flux, folder):
    (save_adapter(flux, folder) / "adapter_config.json").unlink()


def of_a_compiled_model(flux, folder):
    flux.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    save_file({f"module.{k}": v for k, v in load_file(file).items()}, file)


def of_diffusers(flux, folder):
    model = flux.base_model.model
    model._hf_peft_config_loaded = True
    model.save_lora_adapter(folder)


def of_a_pipeline(flux, folder):
    of_diffusers(flux, folder)
    (file,) = folder.iterdir()
    with safe_open(file, "pt") as opened:
        entries = json.loads(opened.metadata()["lora_adapter_metadata"])
    told = {f"transformer.{name}": value for name, value in entries.items()}
    told |= {"text_encoder.peft_type": "LORA", "text_encoder.r": 2}
    tensors = {f"transformer.{name}": tensor for name, tensor in load_file(file).items()}
    tensors["text_encoder.layer.lora_A.weight"] = torch.ones(2, 2)
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(told)})


@pytest.mark.parametrize(
    "write",
    [of_our_own, of_a_compiled_model, of_diffusers, of_a_pipeline],
    ids=lambda f: f.__name__,
)
def test_every_form_that_is_loaded_is_read_without_a_model(flux, tmp_path, write):
    write(flux, tmp_path)
    assert is_checkpoint(tmp_path)
    table, router = table_of_checkpoint(tmp_path)
    expected = table_of_model(flux).layers
    assert table.layers.keys() == expected.keys()
    for path, experts in expected.items():
        assert torch.equal(table.layers[path].lora_A, experts.lora_A)
        assert torch.equal(table.layers[path].lora_B, experts.lora_B)
        assert table.layers[path].scaling == experts.scaling
    assert "rules.strengths" in router


def test_rslora_scales_by_the_root(make_mlp, tmp_path):
    config = MoELoraConfig(target_modules=["first"], r=4, lora_alpha=6, use_rslora=True)
    get_peft_model(make_mlp(), config).save_pretrained(tmp_path)
    table, _ = table_of_checkpoint(tmp_path)
    assert table.layers["first"].scaling == 3
    assert table.in_channels is None


def test_the_width_of_a_model(make_flux, make_mlp):
    assert input_width(make_flux(64)) == 64
    assert input_width(make_mlp()) is None


def test_is_checkpoint(checkpoint, tmp_path):
    assert is_checkpoint(checkpoint)
    assert not is_checkpoint(tmp_path / "nowhere")


class TestFaults:
    def rewrite(self, folder, **changes):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"peft_type": "LORA"}, "Expected a MOE_LORA checkpoint"),
            ({"r": 5}, r"where \(3, 5, 16\) is needed: rank, experts"),
            (
                {"expert_names": ["a", "b"], "num_experts": 2, "router": None},
                "does not have",
            ),
            ({"r": None}, "`r` to be an integer"),
            ({"router_kwargs": 3, "rank_pattern": 3}, "`r[a-z_]*` to be a dict of"),
        ],
    )
    def test_a_config_that_does_not_fit(self, checkpoint, changes, message):
        self.rewrite(checkpoint, **changes)
        with pytest.raises(ValueError, match=message):
            table_of_checkpoint(checkpoint)

    @pytest.mark.parametrize("text", ["{", "[1]", ""])
    def test_a_config_that_is_no_json(self, checkpoint, text):
        (checkpoint / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"Expected (a )?JSON"):
            table_of_checkpoint(checkpoint)

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_missing_file(self, checkpoint, name):
        (checkpoint / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            table_of_checkpoint(checkpoint)

    def test_missing_and_foreign_tensors(self, checkpoint):
        file = checkpoint / "adapter_model.safetensors"
        tensors = load_file(file)
        gone = "base_model.model.x_embedder.moe_lora_experts.lora_B"
        save_file({k: v for k, v in tensors.items() if k != gone}, file)
        with pytest.raises(
            ValueError, match=r"x_embedder\.moe_lora_experts\.lora_B'\): it is incomplete"
        ):
            table_of_checkpoint(checkpoint)
        save_file({"weight": torch.ones(1)}, file)
        with pytest.raises(ValueError, match="none of this method's"):
            table_of_checkpoint(checkpoint)
