from __future__ import annotations

import json

import torch

from moe_lora.export.formats.diffusers import diffusers_file
from moe_lora.export.lora_factors import Factors


def factors(rank, kernel=()):
    return Factors(torch.randn(rank, 5, *kernel), torch.randn(4, rank))


def test_the_header_of_diffusers_has_the_component_before_every_field():
    lora = {"down_blocks.0.a": factors(2), "down_blocks.1.a": factors(3)}
    tensors, metadata = diffusers_file(lora)
    assert all(key.startswith("unet.down_blocks") for key in tensors)
    header = json.loads(metadata["lora_adapter_metadata"])
    assert header["unet.r"] == header["unet.lora_alpha"] == 2
    assert header["unet.target_modules"] == ["down_blocks.0.a", "down_blocks.1.a"]
    assert header["unet.rank_pattern"] == {r"^down_blocks\.1\.a": 3}
