"""From a fresh adapter to a checkpoint and back, on every model, beside stock LoRA."""

from __future__ import annotations

import copy
import json
import pickle
import socket

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

import moe_lora

pytestmark = pytest.mark.slow


def adapted(case, method, name="default", **kwargs):
    model = get_peft_model(case.make(), method.config(case.targets, **kwargs), adapter_name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.add_(0.3)
    return model


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, case, optimizer):
    case(model).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_fresh_adapter_changes_nothing_and_all_of_it_trains(case, method):
    base = case.make()
    model = get_peft_model(case.make(), method.config(case.targets, init_lora_weights=True))
    assert torch.allclose(case(model), case(base), atol=1e-6)
    assert trainable(model) == {n for n, _ in model.named_parameters() if method.prefix in n}
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, case, optimizer)
    case(model).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (
            method.prefix in name
        ), name


def test_disabling_gives_the_base_model_exactly_and_nests(case, method):
    base = case(case.make())
    model = adapted(case, method)
    before, learns = case(model), trainable(model)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.allclose(case(model), base, rtol=0, atol=1e-6)
        assert torch.allclose(case(model), base, rtol=0, atol=1e-6)
        assert not trainable(model)
    assert torch.equal(case(model), before)
    assert trainable(model) == learns


@pytest.mark.parametrize(
    ("name", "low_cpu_mem_usage", "trainable_"),
    [("default", False, True), ("other", True, False), ("saved", True, True)],
)
def test_a_checkpoint_loads_under_any_name(
    case, method, tmp_path, name, low_cpu_mem_usage, trainable_
):
    model = adapted(case, method, "saved", modules_to_save=[case.saved])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        case.make(),
        tmp_path / "saved",
        adapter_name=name,
        low_cpu_mem_usage=low_cpu_mem_usage,
        is_trainable=trainable_,
    )
    torch.testing.assert_close(case(loaded.eval()), case(model.eval()))
    learned = {n.replace(".saved.", f".{name}.") for n in trainable(model)}
    assert trainable(loaded) == (learned if trainable_ else set())


def test_a_second_checkpoint_is_loaded_beside_the_first(case, method, tmp_path):
    model = adapted(case, method)
    other = adapted(case, method, r=2)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "other")
    assert not any(".other" in name for name in trainable(model))
    model.set_adapter("other")
    assert torch.equal(case(model.eval()), case(other.eval()))
    model.load_adapter(tmp_path, "third", is_trainable=True)
    assert any(".third" in name for name in trainable(model))


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(case, method, tmp_path):
    model = adapted(case, method)
    optimizer = optimizer_of(model)
    step(model, case, optimizer)
    model.save_pretrained(tmp_path)
    kept = copy.deepcopy(optimizer.state_dict())
    step(model, case, optimizer)
    resumed = PeftModel.from_pretrained(case.make(), tmp_path, is_trainable=True)
    resumed.train(model.training)
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(kept)
    step(resumed, case, optimizer)
    same(get_peft_model_state_dict(resumed), get_peft_model_state_dict(model))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_whole_and_apart(case, method, how):
    model = adapted(case, method, modules_to_save=[case.saved])
    before, learns = case(model), trainable(model)
    clone = how(model)
    assert torch.equal(case(clone), before)
    assert trainable(clone) == learns
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            if "lora" in name:
                parameter.add_(0.1)
    assert not torch.equal(case(clone), before)
    clone.delete_adapter("default")
    assert torch.equal(case(model), before)
    assert "default" in model.peft_config


def test_loading_and_saving_touches_neither_pickle_nor_network(
    make_case, method, tmp_path, monkeypatch
):
    case = make_case("attention")
    model = adapted(case, method)

    def forbidden(*args, **kwargs):
        raise AssertionError("no pickle, no network")

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    model.save_pretrained(tmp_path)
    assert not {p.suffix for p in tmp_path.iterdir()} & {".bin", ".pt", ".pkl"}
    loaded = PeftModel.from_pretrained(case.make(), tmp_path)
    loaded.load_adapter(tmp_path, "other")
    assert torch.equal(case(loaded), case(model))


def test_keys_of_a_later_version_are_ignored_with_a_warning(make_case, method, tmp_path):
    case = make_case("attention")
    model = adapted(case, method)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        loaded = PeftModel.from_pretrained(case.make(), tmp_path)
    assert torch.equal(case(loaded), case(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_loads(make_case, method, tmp_path, dtype):
    case = make_case("attention")
    model = adapted(case, method)
    model.to(dtype).save_pretrained(tmp_path)
    # A router keeps its float32 in the file, too.
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for n, t in stored.items() if "router" not in n} == {dtype}
    upcast = PeftModel.from_pretrained(case.make(), tmp_path)
    assert {p.dtype for n, p in upcast.named_parameters() if "lora" in n} == {torch.float32}
    same(
        {n: t.float() for n, t in get_peft_model_state_dict(upcast).items()},
        {n: t.float() for n, t in get_peft_model_state_dict(model).items()},
    )
    as_is = PeftModel.from_pretrained(case.make().to(dtype), tmp_path, autocast_adapter_dtype=False)
    kept = {p.dtype for n, p in as_is.named_parameters() if "lora" in n and "router" not in n}
    assert kept == {dtype}


def test_a_model_on_the_meta_device_is_adapted_there_and_filled_later(case, method):
    model = adapted(case, method)
    with torch.device("meta"):
        empty = case.build()
    hollow = get_peft_model(empty, method.config(case.targets)).eval()
    assert {n for n, _ in hollow.named_parameters()} == {n for n, _ in model.named_parameters()}
    layers = [p for n, p in hollow.named_parameters() if "router" not in n]
    assert all(parameter.is_meta for parameter in layers)
    hollow.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(case(hollow), case(model))


def test_a_low_memory_adapter_is_empty_until_its_weights_come(case, method):
    model = adapted(case, method)
    hollow = get_peft_model(case.make(), method.config(case.targets), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in hollow.named_parameters() if "lora" in n)
    result = set_peft_model_state_dict(
        hollow, get_peft_model_state_dict(model), low_cpu_mem_usage=True
    )
    assert not result.unexpected_keys
    assert not any(p.is_meta for p in hollow.parameters())
    assert torch.equal(case(hollow), case(model))


def test_an_adapter_is_not_confused_by_layers_of_its_name(method, tmp_path):
    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.default = torch.nn.Linear(4, 4)
            self.other = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 4)})

        def forward(self, x):
            return self.other["default"](self.default(x))

    x = torch.rand(2, 4)
    torch.manual_seed(0)
    model = get_peft_model(Named(), method.config(["default"]))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Named(), tmp_path)
    assert torch.equal(loaded(x), model(x))


def test_what_is_loaded_is_what_was_saved_when_modes_were_set(make_case, ours, tmp_path):
    case = make_case("attention")
    model = adapted(case, ours, routing_temperature=2.0, use_rslora=True, lora_alpha=5)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.make(), tmp_path)
    assert torch.equal(case(loaded), case(model))
    weights = torch.tensor([0.1, 0.2, 0.7])
    with moe_lora.route(model, weights), moe_lora.route(loaded, weights):
        assert torch.equal(case(loaded), case(model))
