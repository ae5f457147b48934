from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from moe_lora.export.formats.lora_file import read_lora_file


def lora(prefix="", a=".lora_A.weight", b=".lora_B.weight", rank=2, **extra):
    return {f"{prefix}x{a}": torch.ones(rank, 3), f"{prefix}x{b}": torch.ones(4, rank), **extra}


def read(tmp_path, tensors, metadata=None, **kwargs):
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    return read_lora_file(tmp_path / "a.safetensors", **kwargs)


@pytest.mark.parametrize(
    ("prefix", "a", "b", "layout"),
    [
        ("transformer.", ".lora_A.weight", ".lora_B.weight", "diffusers"),
        ("unet.", ".lora.down.weight", ".lora.up.weight", "diffusers"),
        ("", ".lora_A.weight", ".lora_B.weight", "diffusers"),
        ("lora_unet_", ".lora_down.weight", ".lora_up.weight", "kohya"),
        ("diffusion_model.", ".lora_A.weight", ".lora_B.weight", "original"),
    ],
)
def test_the_layouts_and_no_word_of_strength(tmp_path, prefix, a, b, layout):
    plain = read(tmp_path, lora(prefix, a, b))
    assert plain.layout == layout
    assert list(plain.layers) == ["x"]
    assert plain.layers["x"].scaling == 1.0
    assert plain.metadata == {}


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_dotted_names_of_the_original_code(tmp_path, prefix):
    tensors = {
        f"{prefix}double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 3),
        f"{prefix}double_blocks.0.img_attn.qkv.lora_B.weight": torch.ones(9, 2),
    }
    plain = read(tmp_path, tensors)
    assert list(plain.layers) == ["double_blocks.0.img_attn.qkv"]
    assert plain.layout == "original"


def test_alpha_beside_the_factors(tmp_path):
    tensors = lora("lora_unet_", ".lora_down.weight", ".lora_up.weight")
    plain = read(tmp_path, {**tensors, "lora_unet_x.alpha": torch.tensor(3.0)})
    assert plain.layers["x"].scaling == 1.5
    torch.testing.assert_close(plain.layers["x"].factors().delta(), torch.full((4, 3), 3.0))


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 5.0),
        ({"alpha_pattern": {"^x": 4}}, 2.0),
        ({"alpha_pattern": {"y": 4}}, 5.0),
        ({"use_rslora": True}, 10 / 2**0.5),
    ],
)
def test_alpha_in_the_header_or_in_the_config(tmp_path, fields, scale):
    config = {"r": 2, "lora_alpha": 10, **fields}
    header = json.dumps({f"transformer.{k}": v for k, v in config.items()})
    plain = read(tmp_path, lora("transformer."), {"lora_adapter_metadata": header})
    assert plain.layers["x"].scaling == pytest.approx(scale)

    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(lora("base_model.model."), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    for path in (folder, folder / "adapter_model.safetensors"):
        plain = read_lora_file(path)
        assert plain.layout == "peft"
        assert plain.layers["x"].scaling == pytest.approx(scale)


def test_eight_bit_floats_are_read(tmp_path):
    tensors = {k: v.to(torch.float8_e4m3fn) for k, v in lora("transformer.").items()}
    stored = read(tmp_path, tensors).layers["x"]
    torch.testing.assert_close(stored.factors().delta(), torch.full((4, 3), 2.0))


@pytest.mark.parametrize("key", ["transformer.x.lora_magnitude_vector", "transformer.x.dora_scale"])
def test_what_is_more_than_a_lora_is_an_error(tmp_path, key):
    with pytest.raises(ValueError, match=f"but got '{key}'"):
        read(tmp_path, lora("transformer.", **{key: torch.ones(4)}))
    assert read(tmp_path, lora("transformer.", **{key: torch.ones(4)}), skip=[key])


def test_a_folder_with_several_files_is_ambiguous(tmp_path):
    for name in ("a", "b"):
        save_file(lora("transformer."), tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="Expected one safetensors file"):
        read_lora_file(tmp_path)
    save_file(lora("transformer."), tmp_path / "pytorch_lora_weights.safetensors")
    assert read_lora_file(tmp_path).path.name == "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("key", ["lora_adapter_metadata", "moe_lora"])
@pytest.mark.parametrize("header", ["{", "3"])
def test_a_broken_header(tmp_path, header, key):
    with pytest.raises(ValueError, match=f"Expected (a )?JSON.* as `{key}`"):
        read(tmp_path, lora("transformer."), {key: header})


def test_a_config_without_alpha(tmp_path):
    save_file(lora("base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="Expected a finite number as `lora_alpha`"):
        read_lora_file(tmp_path)
