from __future__ import annotations

import re

import torch
from peft.utils.other import get_pattern_key

from moe_lora.export.formats.peft import (
    anchored,
    exact_targets,
    peft_tensors,
    plain_config,
    ranks_config,
)
from moe_lora.export.lora_factors import Factors


def factors(rank, kernel=()):
    return Factors(torch.randn(rank, 5, *kernel), torch.randn(4, rank))


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


def test_the_plain_config_is_whole():
    config = plain_config({"b.0.a": factors(2), "b.1.a": factors(3)}, "some/model")
    assert config.base_model_name_or_path == "some/model"
    assert config.target_modules == {"b.0.a", "b.1.a"}
    assert config.inference_mode
