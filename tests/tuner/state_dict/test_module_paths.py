from __future__ import annotations

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from moe_lora import MoELoraConfig
from moe_lora.tuner.state_dict.module_paths import bare_modules, bare_path, bare_paths


class OwnNames(nn.Module):
    """Call its own layers what wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"base_layer": nn.Linear(3, 3), "original_module": nn.ReLU()})


def adapted(model):
    inject_adapter_in_model(LoraConfig(target_modules=["first"]), model, "below")
    inject_adapter_in_model(MoELoraConfig(target_modules=["first"]), model, "default")
    inject_adapter_in_model(LoHaConfig(target_modules=["first"]), model, "above")
    return model


WRAPPERS = {
    "compile": torch.compile,
    "checkpoint": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
    "average": AveragedModel,
    "both": lambda module: torch.compile(checkpoint_wrapper(module)),
    "nothing": lambda module: module,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("adapt", [adapted, lambda model: model], ids=["adapted", "plain"])
def test_every_module_and_parameter_of_the_bare_model_keeps_its_path(make_mlp, wrap, adapt):
    bare = nn.Sequential(make_mlp(), OwnNames())
    paths = {path for path, _ in bare.named_modules()}
    weights = {name: p.data_ptr() for name, p in bare.named_parameters()}
    model = nn.Sequential(adapt(make_mlp()), OwnNames())
    model[0].second = wrap(model[0].second)
    model[0].first = wrap(model[0].first)
    model[0], model[1] = wrap(model[0]), wrap(model[1])
    found = {path for path in bare_paths(model) if "router" not in path}
    assert found == paths
    ours = [bare_path(n, model) for n, _ in model.named_parameters() if "lora" not in n]
    assert sorted(n for n in ours if "hada" not in n) == sorted(weights)


def test_a_layer_comes_in_all_its_forms_from_the_outermost_on(make_mlp):
    model = adapted(make_mlp())
    forms = [module for _, bare, module in bare_modules(model) if bare == "first"]
    inside = model.first.base_layer
    assert forms == [model.first, inside, inside.base_layer, model.first.get_base_layer()]
    inner = [p for p, m in model.named_modules() if "MoELoraLinear" in type(m).__name__]
    assert [bare_path(p, model) for p in inner] == ["first"]


def test_whole_modules_trained_beside_others(make_mlp):
    model = get_peft_model(
        make_mlp(), LoraConfig(target_modules=["first"], modules_to_save=["second"])
    ).base_model.model
    assert bare_path("second.original_module.weight", model) == "second.weight"
    assert bare_paths(model) == {"", "first", "second", "head"}


def test_distributed(make_mlp, one_process):
    model = make_mlp()
    model.first = DistributedDataParallel(model.first)
    assert bare_path("first.module.weight", model) == "first.weight"
    assert bare_paths(model) == {"", "first", "second", "head"}


def test_a_state_dicts_keys_without_adapter_names(make_mlp):
    model = make_mlp()
    inject_adapter_in_model(MoELoraConfig(target_modules=["first"]), model, "default")
    inject_adapter_in_model(LoraConfig(target_modules=["first"]), model, "above")
    key = "first.base_layer.moe_lora_experts.lora_A"
    assert bare_path(key, model) == "first.moe_lora_experts.lora_A"


def test_a_shared_module_comes_once(make_mlp):
    layer = nn.Linear(2, 2)
    assert bare_paths(nn.Sequential(layer, layer)) == {"", "0"}


def test_steps_that_a_state_dict_does_not_show():
    model = nn.Sequential(checkpoint_wrapper(nn.DataParallel(nn.Linear(1, 1))))
    (key, *_) = model.state_dict()
    assert key == "0.module.weight"
    assert bare_path(key, model) == "0.weight"


@pytest.mark.parametrize(
    ("path", "bare"),
    [
        ("a._orig_mod.b", "a.b"),
        ("a.base_layer", "a"),
        ("module.base_layer", "module"),
        ("module.a", "module.a"),
        ("module.b", "module.b"),
    ],
)
def test_paths_in_a_file_are_compared_with_those_of_a_model(path, bare):
    assert bare_path(path, known={"a", "a.b", "module", "module.a"}) == bare
