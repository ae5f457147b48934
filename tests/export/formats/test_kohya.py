from __future__ import annotations

import pytest
import torch

from moe_lora.export.formats.kohya import kohya_tensors
from moe_lora.export.lora_factors import Factors


def factors(rank, kernel=()):
    return Factors(torch.randn(rank, 5, *kernel), torch.randn(4, rank))


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
