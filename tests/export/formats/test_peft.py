from __future__ import annotations

import json
import re

import pytest
import torch
from peft.utils.other import get_pattern_key

from moe_lora.export.formats.peft import (
    anchored,
    diffusers_file,
    exact_targets,
    is_unet,
    kohya_tensors,
    peft_tensors,
    plain_config,
    ranks_config,
)
from moe_lora.export.lora_factors import Factors


def factors(rank, kernel=()):
    return Factors(torch.randn(rank, 5, *kernel), torch.randn(4, rank))


@pytest.mark.parametrize(
    ("paths", "base_class", "expected"),
    [
        (["transformer_blocks.0.attn.to_q"], None, False),
        (["down_blocks.0.resnets.0.conv1", "conv_in"], None, True),
        (["down_blocks.0.x"], "FluxTransformer2DModel", False),
        (["anything"], "UNet2DConditionModel", True),
    ],
)
def test_is_unet(paths, base_class, expected):
    assert is_unet(paths, base_class) is expected


def test_targets_match_themselves_only():
    assert exact_targets(["b.1.q", "b.0.q"]) == ["b.0.q", "b.1.q"]
    pattern = exact_targets(["b.0.q", "proj_out"])
    assert isinstance(pattern, str)
    assert re.fullmatch(pattern, "proj_out")
    assert not re.fullmatch(pattern, "b.0.proj_out")
    assert not re.fullmatch(pattern, "b.0xq")


def test_ranks_are_the_usual_one_and_exceptions_for_whole_paths():
    config = ranks_config({"b.0.proj_out": 4, "b.1.proj_out": 4, "proj_out": 2})
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    pattern = config["rank_pattern"]
    assert pattern == config["alpha_pattern"] == {anchored("proj_out"): 2}
    assert get_pattern_key(list(pattern), "proj_out") in pattern
    assert get_pattern_key(list(pattern), "b.0.proj_out") not in pattern


def test_convolutions_have_a_pointwise_second_factor():
    tensors = peft_tensors({"conv": factors(2, (3, 3)), "lin": factors(2)}, "x.")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "x.conv.lora_A.weight": (2, 5, 3, 3),
        "x.conv.lora_B.weight": (4, 2, 1, 1),
        "x.lin.lora_A.weight": (2, 5),
        "x.lin.lora_B.weight": (4, 2),
    }


def test_the_header_of_diffusers_has_the_component_before_every_field():
    lora = {"down_blocks.0.a": factors(2), "down_blocks.1.a": factors(3)}
    tensors, metadata = diffusers_file(lora)
    assert all(key.startswith("unet.down_blocks") for key in tensors)
    header = json.loads(metadata["lora_adapter_metadata"])
    assert header["unet.r"] == header["unet.lora_alpha"] == 2
    assert header["unet.target_modules"] == ["down_blocks.0.a", "down_blocks.1.a"]
    assert header["unet.rank_pattern"] == {r"^down_blocks\.1\.a": 3}


def test_the_plain_config_is_whole():
    config = plain_config({"b.0.a": factors(2), "b.1.a": factors(3)}, "some/model")
    assert config.base_model_name_or_path == "some/model"
    assert config.target_modules == {"b.0.a", "b.1.a"}
    assert config.inference_mode


def test_every_kohya_layer_has_the_same_alpha_and_its_own_strength():
    lora = {"mid_block.attentions.0.proj_in": factors(2), "conv_in": factors(4, (3, 3))}
    tensors = kohya_tensors(lora)
    for path, held in lora.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        alpha = tensors[f"{name}.alpha"]
        assert alpha == 4
        up, down = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        delta = alpha / held.rank * (up.flatten(1) @ down.flatten(1))
        torch.testing.assert_close(delta, held.delta().flatten(1))


def test_an_unknown_base_model_counts_as_flux_only_with_its_single_blocks():
    double = {"transformer_blocks.0.norm1.linear": factors(2)}
    with pytest.raises(ValueError, match="the base model is unknown"):
        kohya_tensors(double)
    assert kohya_tensors({**double, "single_transformer_blocks.0.norm.linear": factors(2)})
    assert kohya_tensors(double, "FluxTransformer2DModel")
