from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from moe_lora.export.formats.unet_names import diffusers_name, flatten_unet, is_unet
from moe_lora.export.lora_factors import Factors

NAMES = [
    "input_blocks_0_0",
    "input_blocks_1_0_in_layers_2",
    "input_blocks_2_0_emb_layers_1",
    "input_blocks_3_0_op",
    "input_blocks_4_0_skip_connection",
    "input_blocks_4_1_proj_in",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_k",
    "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
    "middle_block_0_out_layers_3",
    "middle_block_1_transformer_blocks_3_attn1_to_out_0",
    "middle_block_2_in_layers_2",
    "output_blocks_0_1_transformer_blocks_0_attn1_to_q",
    "output_blocks_2_2_conv",
    "output_blocks_5_1_proj_out",
    "output_blocks_8_0_out_layers_3",
    "time_embed_0",
    "label_emb_0_2",
    "out_2",
]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_diffusers_makes_of_it(name):
    state = {
        f"lora_unet_{name}.lora_down.weight": torch.ones(1, 2),
        f"lora_unet_{name}.lora_up.weight": torch.ones(3, 1),
    }
    config = SimpleNamespace(layers_per_block=2)
    converted, _ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=config)
    key = min(converted).removeprefix("unet.").replace(".processor", "")
    key = key.replace("to_out_lora", "to_out.0_lora")
    for ending in (".lora.down.weight", "_lora.down.weight"):
        key = key.removesuffix(ending)
    assert diffusers_name(name, 2) == key.replace(".", "_")


@pytest.mark.parametrize(
    "name", ["down_blocks_0_x", "input_blocks_4", "middle_block_7_in_layers_2", "output_blocks_1_x"]
)
def test_foreign_names(name):
    assert diffusers_name(name, 2) is None


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


def test_a_unet_layer_that_would_not_be_found_again_is_told():
    lora = {
        "mid_block.attentions.0.proj_in": Factors(torch.randn(2, 5), torch.randn(4, 2)),
        "add_embedding.linear_1": Factors(torch.randn(2, 5), torch.randn(4, 2)),
    }
    flat, dropped = flatten_unet(lora)
    assert list(flat) == ["mid_block_attentions_0_proj_in"]
    assert dropped == ["add_embedding.linear_1"]
