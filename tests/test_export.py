from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

import moe_lora
from moe_lora import MoELoraConfig


@pytest.fixture
def model(make_flux, flux_targets):
    config = MoELoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=flux_targets,
        rank_pattern={"to_q": 2},
        alpha_pattern={"proj_mlp": 3},
        router="three_expert_removal",
        init_lora_weights=False,
    )
    return get_peft_model(make_flux(), config).eval()


def test_every_expert_loads_with_stock_peft_and_equals_one_hot_weights(
    model, make_flux, make_flux_inputs, tmp_path
):
    folders = moe_lora.save_experts(model, tmp_path)
    names = ["removal_expert", "background_expert", "completion_expert"]
    assert folders == [tmp_path / name for name in names]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)
    inputs = make_flux_inputs()
    for index, folder in enumerate(folders):
        with moe_lora.route(model, torch.eye(3)[index].expand(2, 3)):
            expected = model(**inputs)[0]
        plain = PeftModel.from_pretrained(make_flux(), folder).eval()
        assert type(plain.peft_config["default"]).__name__ == "LoraConfig"
        torch.testing.assert_close(plain(**inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_saving_again_replaces_the_folder(model, tmp_path):
    moe_lora.save_experts(model, tmp_path)
    stale = tmp_path / "removal_expert" / "stale"
    stale.touch()
    moe_lora.save_experts(model, tmp_path)
    assert not stale.exists()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failing_save_leaves_the_previous_folder_whole(model, tmp_path, monkeypatch):
    moe_lora.save_experts(model, tmp_path)
    before = (tmp_path / "removal_expert" / "adapter_model.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(moe_lora.export, "write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        moe_lora.save_experts(model, tmp_path)
    assert (tmp_path / "removal_expert" / "adapter_model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unknown_adapter_raises(model, tmp_path):
    with pytest.raises(ValueError, match="'other'"):
        moe_lora.save_experts(model, tmp_path, adapter_name="other")
