from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.export import export_lora
from moe_lora.export.describe import describe


def test_a_mixture(flux, tmp_path):
    flux.save_pretrained(tmp_path)
    found = describe(tmp_path)
    assert found["kind"] == "mixture"
    assert found["experts"] == ["removal_expert", "background_expert", "completion_expert"]
    assert len(found["layers"]) == 14
    layer = found["layers"]["transformer_blocks.0.attn.to_q"]
    assert (layer["rank"], layer["in"], layer["out"], layer["scaling"]) == (2, [32], 32, 5.0)
    held = flux.base_model.model.transformer_blocks[0].attn.to_q
    total = {}
    for index, name in enumerate(found["experts"]):
        expected = held.get_delta_weight("default", torch.eye(3)[index]).norm()
        assert layer["norms"][name] == pytest.approx(float(expected), rel=1e-5)
        total[name] = sum(x["norms"][name] ** 2 for x in found["layers"].values()) ** 0.5
    assert found["norms"] == pytest.approx(total)
    assert found["router"]["name"] == "three_expert_removal"
    router = flux.base_model.model.moe_router
    assert found["router"]["parameters"] == sum(p.numel() for p in router.parameters())
    assert found["base"] == {
        "model": None,
        "class": "FluxTransformer2DModel",
        "in_channels": 384,
    }
    assert describe(tmp_path / "adapter_model.safetensors") == found


def test_a_mixture_without_a_router(make_mlp, tmp_path):
    get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"])).save_pretrained(tmp_path)
    found = describe(tmp_path)
    assert found["router"] is None
    assert found["norms"]["removal_expert"] == 0.0


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_a_plain_lora(flux, tmp_path, format):
    report = export_lora(flux, tmp_path / "lora", [0.5, 0.3, 0.2], format=format)
    found = describe(report.path)
    assert found["kind"] == "lora"
    assert found["layout"] == format
    assert len(found["layers"]) == 14
    layer = found["layers"]["x_embedder"]
    assert (layer["rank"], layer["in"], layer["scaling"]) == (12, [384], 1.0)
    held = flux.base_model.model.x_embedder
    expected = held.get_delta_weight("default", torch.tensor([0.5, 0.3, 0.2])).norm()
    assert layer["norm"] == pytest.approx(float(expected), rel=1e-5)
    assert found["base"]["in_channels"] == 384
    assert found["moe_lora"]["version"] == moe_lora.__version__
