from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.tuner.validation.names import check_adapter_name, file_name_problem

BAD = [
    "",
    " ",
    ".",
    "..",
    "../x",
    "/home/me/photos",
    "a/b",
    "a\\b",
    "C:",
    "a\0b",
    "a\nb",
    "a\x7f",
    "\u202eexe",
    "\ud800",
    " a",
    "a ",
    ".a",
    "a.",
    "con",
    "NUL.txt",
    "x" * 201,
    "é" * 101,
    None,
    1,
    ["a"],
]


@pytest.mark.parametrize("name", BAD)
def test_invalid_folder_names_are_refused_for_experts_and_adapters(make_mlp, name):
    with pytest.raises(ValueError, match="expert_names"):
        MoELoraConfig(expert_names=["good", name])
    config = MoELoraConfig(target_modules=["first"])
    model = make_mlp()
    with pytest.raises(ValueError, match="`adapter_name` to be a name"):
        inject_adapter_in_model(config, model, name)
    assert not any("moe" in path for path, _ in model.named_modules())


@pytest.mark.parametrize("name", ["a", "removal_expert", "Fond d'écran", "背景", "v1.2", "a b"])
def test_usual_expert_names_are_allowed(name):
    assert MoELoraConfig(expert_names=[name]).expert_names == (name,)


@pytest.mark.parametrize("names", [("a", "A"), ("é", "e\u0301"), ("a", "a")])
def test_experts_of_one_folder_are_refused(names):
    with pytest.raises(ValueError, match="distinct `expert_names`"):
        MoELoraConfig(expert_names=names)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_a_name_is_refused_or_is_one_entry_of_a_folder(tmp_path_factory, name):
    if file_name_problem(name) is not None:
        return
    folder = tmp_path_factory.mktemp("names")
    (folder / name).mkdir()
    assert os.listdir(folder) == [name]
    assert Path(folder, name).resolve().parent == folder.resolve()


@settings(max_examples=50, deadline=None)
@given(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(["first", "keys", "forward", "training", "T_destination", "lora_A", "0"]),
    )
)
def test_an_adapter_name_is_refused_or_works(tmp_path_factory, name):
    base = torch.nn.Sequential(torch.nn.Linear(2, 2))
    config = MoELoraConfig(target_modules=["0"], init_lora_weights=False, r=1)
    try:
        check_adapter_name(name)
    except ValueError:
        with pytest.raises(ValueError, match="adapter_name"):
            get_peft_model(base, config, name)
        return
    model = get_peft_model(base, config, name)
    folder = moe_lora.save_adapter(model, tmp_path_factory.mktemp("saved"), name)
    loaded = torch.nn.Sequential(torch.nn.Linear(2, 2))
    loaded.load_state_dict({"0.weight": base[0].base_layer.weight, "0.bias": base[0].bias})
    moe_lora.load_adapter(loaded, folder, name)
    x = torch.ones(1, 2)
    assert torch.equal(loaded(x), model(x))


def test_a_second_adapter_and_a_loaded_one_are_checked(make_mlp, tmp_path):
    model = get_peft_model(make_mlp(), MoELoraConfig(target_modules=["first"]))
    folder = moe_lora.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="without a dot"):
        model.add_adapter("a.b", MoELoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="without any of"):
        model.load_adapter(folder, "../other")
    with pytest.raises(ValueError, match="without any of"):
        moe_lora.load_adapter(make_mlp(), folder, "../other")
    assert list(model.peft_config) == ["default"]


def test_a_foreign_adapter_keeps_its_name(make_mlp):
    model = inject_adapter_in_model(LoraConfig(target_modules=["first"]), make_mlp(), "lora_plain")
    inject_adapter_in_model(MoELoraConfig(target_modules=["second"]), model, "mixture")
    assert set(model.peft_config) == {"lora_plain", "mixture"}
