from __future__ import annotations

import dataclasses
import json

import pytest
from peft import PeftConfig, TaskType

from moe_lora import MoELoraConfig
from moe_lora.tuner.validation.config_fields import CHECKS


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
        ({"r": 0}, r"`r` to be an integer in \[1, "),
        ({"rank_pattern": {"to_q": 0}}, "rank_pattern"),
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
def test_invalid_fields_raise(kwargs, message):
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


NAN, INFINITE = float("nan"), float("inf")
# The values that a field refuses, of all types and of its own.
REFUSED = {
    "task_type": ["WHAT", 1, True],
    "peft_type": [],  # always replaced
    "auto_mapping": ["x", [1], 1],
    "peft_version": [1, True, []],
    "base_model_name_or_path": [1, True, []],
    "revision": [1, True, []],
    "inference_mode": [0, 1, "true", None],
    "r": [0, -1, 1.0, True, "8", None, NAN, 10**9, [8]],
    "lora_alpha": [NAN, INFINITE, -INFINITE, True, "8", None, [8], 10**400],
    "lora_dropout": [NAN, -0.1, 1.0, True, "0", None],
    "target_modules": [1, True, [1], [None], {"to_q": 1}],
    "exclude_modules": [1, True, [1], {"to_q": 1}],
    "num_experts": [0, -1, 2.0, True, "3", 10**9, 1e9, [3]],
    "expert_names": ["abc", [], [1], 3, True, {"a": 1}, [f"e{i}" for i in range(1025)]],
    "use_rslora": [0, 1, "yes", None],
    "init_lora_weights": [0, 1, 1.0, "orthogonal", None, ["kaiming"]],
    "rank_pattern": [{"to_q": 0}, {"to_q": 1.5}, {"to_q": True}, {1: 1}, [("to_q", 1)], None],
    "alpha_pattern": [{"to_q": NAN}, {"to_q": "1"}, {"to_q": True}, {1: 1}, [1], None],
    "modules_to_save": ["head", 1, [1], True],
    "layers_to_transform": [-1, 1.5, True, "0", ["0"], [True], {"0": 1}],
    "layers_pattern": [1, True, [1]],
    "router": [1, True, ["x"], {"x": 1}],
    "router_kwargs": [None, [1], "x", {1: 2}, {"x": object()}],
    "routing_strategy": ["argmax", None, 1, True, ["soft"]],
    "routing_temperature": [0, -1.0, NAN, INFINITE, True, "1", None],
    "top_k": [0, 1.5, True, "1", [1]],
    "routing_mode": ["off", None, 1, True],
    "expert_dropout": [NAN, -0.1, 1.0, True, "0", None],
    "base_in_channels": [0, 1.5, True, "64"],
    "format_version": [0, -1, 1.5, True, "1", None],
}


def test_every_field_has_a_check_and_is_tried():
    names = {field.name for field in dataclasses.fields(MoELoraConfig)}
    assert CHECKS.keys() == names == REFUSED.keys()
    defaults = MoELoraConfig()
    assert all(CHECKS[name].allows(getattr(defaults, name)) for name in names)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in REFUSED.items() for value in values],
    ids=lambda value: repr(value)[:20],
)
def test_a_value_of_the_wrong_kind_is_refused_in_code_and_in_a_file(tmp_path, name, value):
    topk = {"routing_strategy": "topk"} if name == "top_k" else {}
    message = "task type" if name == "task_type" else f"Expected .*`{name}` to be|of `{name}`"
    with pytest.raises(ValueError, match=message) as error:
        MoELoraConfig(**{**topk, name: value})
    assert len(str(error.value)) < 500
    try:
        text = json.dumps({**topk, "peft_type": "MOE_LORA", name: value})
    except TypeError:
        return
    if name in json.loads(text) and json.loads(text)[name] != value and value == value:
        return  # no JSON value
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_peft_values_of_their_own_types_are_allowed():
    config = MoELoraConfig(task_type=TaskType.FEATURE_EXTRACTION, layers_to_transform=(0, 1))
    assert config.task_type == "FEATURE_EXTRACTION"
    assert MoELoraConfig(expert_names=["a"]).num_experts == 1
