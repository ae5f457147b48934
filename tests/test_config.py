from __future__ import annotations

import json

import pytest
from peft import PeftConfig

from moe_lora import MoELoraConfig


def test_target_modules_alone_give_three_named_experts_without_router():
    config = MoELoraConfig(target_modules=["to_q"])
    assert config.expert_names == ("removal_expert", "background_expert", "completion_expert")
    assert config.num_experts == 3
    assert config.router is None
    assert config.peft_type.value == "MOE_LORA"


def test_a_number_of_experts_gives_numbered_names():
    assert MoELoraConfig(num_experts=4).expert_names == tuple(f"expert_{i}" for i in range(4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_experts": 2, "expert_names": ["a", "b", "c"]}, r"number of `expert_names` \(3\)"),
        ({"expert_names": ["a", "a"]}, "distinct"),
        ({"num_experts": 0}, "num_experts"),
        ({"r": 0}, "rank of `r`"),
        ({"rank_pattern": {"to_q": 0}}, "rank of `to_q`"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights"),
        ({"routing_strategy": "argmax"}, "routing_strategy"),
        ({"routing_temperature": 0.0}, "routing_temperature"),
        ({"routing_strategy": "topk"}, "top_k"),
        ({"routing_strategy": "topk", "top_k": 4}, r"\[1, num_experts=3\], but got 4"),
        ({"top_k": 2}, "topk"),
        ({"target_modules": ".*q", "layers_to_transform": 1}, "list"),
    ],
)
def test_what_cannot_be_honoured_raises(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoELoraConfig(**kwargs)


def test_saving_and_loading_keeps_every_field(tmp_path):
    config = MoELoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_v"],
        expert_names=("a", "b"),
        router="uniform",
        routing_strategy="topk",
        top_k=1,
        rank_pattern={"to_q": 2},
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoELoraConfig)
    for name, value in config.to_dict().items():
        found = loaded.to_dict()[name]
        assert (set(found) if isinstance(found, list) else found) == (
            set(value) if isinstance(value, list) else value
        ), name


def test_an_unknown_key_of_a_later_version_is_ignored_with_a_warning(tmp_path):
    MoELoraConfig(target_modules=["to_q"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        assert PeftConfig.from_pretrained(tmp_path).num_experts == 3


def test_every_field_explains_itself():
    for name, field in MoELoraConfig.__dataclass_fields__.items():
        if name in MoELoraConfig.__annotations__:
            assert field.metadata["help"].endswith("."), name
