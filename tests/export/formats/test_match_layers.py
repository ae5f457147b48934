from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file

from moe_lora import MoELoraConfig
from moe_lora.export.formats.match_layers import read_lora_for


def save(path, **layers):
    tensors = {}
    for name, (down, up) in layers.items():
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, path)
    return path


def test_layers_are_found_inside_an_adapted_model(make_mlp, tmp_path):
    factors = torch.ones(2, 6), torch.ones(10, 2)
    path = save(tmp_path / "a.safetensors", first=factors)
    adapted = make_mlp()
    get_peft_model(adapted, MoELoraConfig(target_modules=["first"]))
    for model in (make_mlp(), adapted):
        found = read_lora_for(model, path)
        assert list(found) == ["first"]
        assert torch.equal(found["first"].down, factors[0])


@pytest.mark.parametrize(
    ("down", "up"), [((2, 7), (10, 2)), ((2, 6), (9, 2)), ((2, 6, 3, 3), (10, 2))]
)
def test_other_sizes_are_an_error(make_mlp, tmp_path, down, up):
    path = save(tmp_path / "a.safetensors", first=(torch.ones(down), torch.ones(up)))
    with pytest.raises(ValueError, match=r"fit 'first', whose weight has the shape \(10, 6\)"):
        read_lora_for(make_mlp(), path)


def test_a_kernel_must_fit(make_unet, tmp_path):
    good = save(tmp_path / "a.safetensors", conv_in=(torch.ones(2, 4, 3, 3), torch.ones(8, 2)))
    assert read_lora_for(make_unet(), good)["conv_in"].down.shape == (2, 4, 3, 3)
    bad = save(tmp_path / "b.safetensors", conv_in=(torch.ones(2, 4, 1, 1), torch.ones(8, 2)))
    with pytest.raises(ValueError, match=r"but it is for \(8, 4, 1, 1\)"):
        read_lora_for(make_unet(), bad)


def test_what_is_no_linear_layer_or_convolution_is_unknown(make_unet, tmp_path):
    path = save(tmp_path / "a.safetensors", conv_norm_out=(torch.ones(1, 8), torch.ones(8, 1)))
    with pytest.raises(ValueError, match="has no 'conv_norm_out'"):
        read_lora_for(make_unet(), path)


def test_the_original_names_of_a_unet_are_found(make_unet, tmp_path):
    unet, names = (
        make_unet(),
        {
            "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
            "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
            "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
        },
    )
    factors = {}
    for name, path in names.items():
        weight = unet.get_submodule(path).weight
        factors[f"lora_unet_{name}"] = (
            torch.ones(2, *weight.shape[1:]),
            torch.ones(len(weight), 2),
        )
    found = read_lora_for(unet, save(tmp_path / "a.safetensors", **factors))
    assert sorted(found) == sorted(names.values())
