"""Bad checkpoints: one sentence each, and a model that is as it was."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from corrupt_checkpoints import CONFIG, FAULTS, WEIGHTS, config
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.save_and_load import load_adapter, save_adapter


class Wide(torch.nn.Module):
    """Has the layers of the MLP, in other widths, or lacks one."""

    def __init__(self, hidden=14, second=True):
        super().__init__()
        self.first = torch.nn.Linear(6, hidden)
        if second:
            self.second = torch.nn.Linear(hidden, 6)
        self.head = torch.nn.Linear(6, 2)


@pytest.fixture
def checkpoint(make_mlp, tmp_path) -> Path:
    return save_adapter(get_peft_model(make_mlp(), config()), tmp_path / "good")


def traces(model) -> dict:
    """Everything about a model that loading may not change."""
    return {
        "types": [(name, type(module).__name__) for name, module in model.named_modules()],
        "flags": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "ids": [id(p) for p in model.parameters()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "configs": sorted(getattr(model, "peft_config", {})),
        "training": model.training,
    }


def unchanged(model, before, values):
    assert traces(model) == before
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in values.items())
    assert state.keys() == values.keys()


def kept(model):
    return traces(model), {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("start", ["base", "peft", "injected"])
@pytest.mark.parametrize("fault", FAULTS)
def test_load_adapter_says_what_is_wrong_and_changes_nothing(make_mlp, checkpoint, fault, start):
    model = make_mlp()
    if start == "peft":
        model = get_peft_model(model, config(r=2))
    elif start == "injected":
        load_adapter(model, checkpoint, "default")
    spoil, message = FAULTS[fault]
    before = kept(model)
    spoil(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message) as error:
            load_adapter(model, checkpoint, "other")
    unchanged(model, *before)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: Wide(), "trained on a base model with layers of other widths"),
        (lambda: Wide(hidden=10, second=False), "Wide has no 'second': it was trained on another"),
    ],
)
@pytest.mark.parametrize("stock", [False, True])
def test_another_base_is_refused_before_it_changes(checkpoint, base, message, stock):
    model = base()
    before = kept(model)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(model, checkpoint) if stock else load_adapter(model, checkpoint)
    unchanged(model, *before)


def test_a_base_with_more_matching_layers_is_refused(make_mlp, checkpoint):
    model = torch.nn.Sequential()
    model.add_module("outer", make_mlp())
    for name, child in make_mlp().named_children():
        model.add_module(name, child)
    before = kept(model)
    with pytest.raises(ValueError, match="6 of the model's 13 tensors are missing"):
        load_adapter(model, checkpoint)
    unchanged(model, *before)


@pytest.mark.parametrize("start", ["base", "peft", "injected"])
def test_a_failure_after_the_injection_is_undone(make_mlp, checkpoint, monkeypatch, start):
    model = make_mlp()
    if start == "peft":
        model = get_peft_model(model, config(r=2))
    elif start == "injected":
        load_adapter(model, checkpoint)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_lora.save_and_load.check_in_memory", interrupt)
    before = kept(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyboardInterrupt):
            load_adapter(model, checkpoint, "other")
    unchanged(model, *before)
    if start != "base":
        assert moe_lora.routing_stats(model).expert_names == config().expert_names
        with pytest.raises(ValueError, match=r"one of \['default'\]"):
            moe_lora.routing_stats(model, "other")
        assert model(torch.rand(2, 6)).isfinite().all()


def test_a_taken_name_is_refused(make_mlp, checkpoint):
    model = make_mlp()
    load_adapter(model, checkpoint)
    before = kept(model)
    with pytest.raises(ValueError, match=r"unused adapter name, but the model has \['default'\]"):
        load_adapter(model, checkpoint)
    unchanged(model, *before)


# What stock loading reads itself before it asks us, or does not ask us about at all: PEFT looks
# for missing files on the Hub, loads foreign methods as such, and does not mind NaN.
STOCK_READS = {
    "no folder",
    "no config",
    "no weights",
    "pickled weights",
    "diffusers file",
    "truncated config",
    "empty config",
    "config is no object",
    "foreign config",
    "unknown method",
    "integer experts",
    "NaN",
}


@pytest.mark.parametrize("call", ["from_pretrained", "load_adapter"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in STOCK_READS])
def test_stock_loading_says_the_same_and_changes_nothing(make_mlp, checkpoint, fault, call):
    spoil, message = FAULTS[fault]
    model = make_mlp()
    if call == "load_adapter":
        model = get_peft_model(model, config(r=2))
    before = kept(model)
    spoil(checkpoint)
    load = {
        "from_pretrained": lambda: PeftModel.from_pretrained(model, checkpoint),
        "load_adapter": lambda: model.load_adapter(checkpoint, "other"),
    }[call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises((ValueError, TypeError), match=message):
            load()
    unchanged(model, *before)


class TestDiffusers:
    def save(self, make_flux, targets, folder, channels=384):
        model = make_flux(channels)
        model.add_adapter(
            MoELoraConfig(
                r=2, target_modules=targets, router="three_expert_removal", init_lora_weights=False
            )
        )
        save_adapter(model, folder)
        return model.eval()

    def test_an_adapter_travels_between_diffusers_and_peft(
        self, make_flux, make_flux_inputs, flux_targets, tmp_path
    ):
        model = self.save(make_flux, flux_targets, tmp_path / "ours")
        inputs = make_flux_inputs()
        expected = model(**inputs)[0]
        peft = PeftModel.from_pretrained(make_flux(), tmp_path / "ours").eval()
        assert torch.equal(peft(**inputs)[0], expected)
        peft.save_pretrained(tmp_path / "theirs")
        mine, theirs = (load_file(tmp_path / n / WEIGHTS) for n in ("ours", "theirs"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        configs = [json.loads((tmp_path / n / CONFIG).read_text()) for n in ("ours", "theirs")]
        for entries in configs:
            entries["target_modules"] = sorted(entries["target_modules"])
        assert configs[0] == configs[1]
        loaded = make_flux()
        load_adapter(loaded, tmp_path / "theirs", "any name", is_trainable=True)
        assert torch.equal(loaded.eval()(**inputs)[0], expected)
        assert loaded.active_adapters() == ["any name"]
        loaded.disable_adapters()
        loaded.delete_adapters("any name")

    @pytest.mark.parametrize("stock", [False, True])
    @pytest.mark.parametrize("targets", [["to_q"], ["to_q", "x_embedder"]])
    def test_a_fill_adapter_on_a_plain_flux_is_refused(self, make_flux, tmp_path, targets, stock):
        self.save(make_flux, targets, tmp_path)
        plain = make_flux(64)
        before = kept(plain)
        with pytest.raises(ValueError, match=r"384 input channels.*Transformer2DModel has 64"):
            PeftModel.from_pretrained(plain, tmp_path) if stock else load_adapter(plain, tmp_path)
        unchanged(plain, *before)

    def test_the_base_width_is_recorded_and_a_wrong_one_refused_by_add_adapter(
        self, make_flux, tmp_path
    ):
        self.save(make_flux, ["to_q"], tmp_path, channels=64)
        entries = json.loads((tmp_path / CONFIG).read_text())
        assert (entries["base_in_channels"], entries["format_version"]) == (64, 1)
        model = make_flux()
        before = kept(model)
        with pytest.raises(ValueError, match="has 384"):
            model.add_adapter(MoELoraConfig.from_pretrained(tmp_path))
        assert not model._hf_peft_config_loaded
        before[0]["attributes"] = traces(model)["attributes"]  # that flag is now the model's own
        unchanged(model, *before)

    def test_load_lora_adapter_does_not_take_a_mixture_for_a_lora(
        self, make_flux, make_flux_inputs, tmp_path
    ):
        self.save(make_flux, ["to_q"], tmp_path)
        model = make_flux().eval()
        inputs = make_flux_inputs()
        expected = model(**inputs)[0]
        # Without the right prefix diffusers finds nothing, and says so in its log alone.
        model.load_lora_adapter(tmp_path, weight_name=WEIGHTS)
        assert torch.equal(model(**inputs)[0], expected)
        with pytest.raises(ValueError, match=r"moe_lora_experts'.* not found in the base model"):
            model.load_lora_adapter(tmp_path, weight_name=WEIGHTS, prefix="base_model.model")
        assert torch.equal(model(**inputs)[0], expected)


@pytest.mark.slow
class TestSaving:
    def test_saving_twice_leaves_only_the_second_and_what_else_was_there(
        self, make_mlp, checkpoint
    ):
        (checkpoint / "notes.txt").write_text("mine")
        model = get_peft_model(make_mlp(), config(r=2))
        save_adapter(model, checkpoint)
        assert sorted(p.name for p in checkpoint.iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]
        loaded = make_mlp()
        load_adapter(loaded, checkpoint)
        x = torch.rand(2, 6)
        assert torch.equal(loaded(x), model(x))

    @pytest.mark.parametrize("failing", ["save_file", "config"])
    def test_a_failing_write_leaves_the_previous_checkpoint(
        self, make_mlp, checkpoint, monkeypatch, failing
    ):
        before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}

        def fail(*args, **kwargs):
            raise OSError("disk full")

        if failing == "save_file":
            monkeypatch.setattr("moe_lora.safetensors_io.save_file", fail)
        else:
            monkeypatch.setattr(MoELoraConfig, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            save_adapter(get_peft_model(make_mlp(), config(r=2)), checkpoint)
        assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before

    def test_between_its_two_renames_a_save_is_the_new_checkpoint(
        self, make_mlp, checkpoint, monkeypatch
    ):
        rename = os.replace

        def fail(source, target):
            if Path(target).name == CONFIG:
                raise OSError("killed")
            rename(source, target)

        monkeypatch.setattr(os, "replace", fail)
        model = get_peft_model(make_mlp(), config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        save_adapter(model, checkpoint)  # the config is what it was, and is not renamed
        loaded = make_mlp()
        load_adapter(loaded, checkpoint)
        assert torch.equal(
            loaded.first.moe_lora_experts["default"].lora_A,
            model.base_model.model.first.moe_lora_experts["default"].lora_A,
        )
        model = get_peft_model(make_mlp(), config(r=2))
        with pytest.raises(OSError, match="killed"):
            save_adapter(model, checkpoint)
        assert not (checkpoint / CONFIG).exists()  # rather than an old one beside new weights
        loaded = make_mlp()
        load_adapter(loaded, checkpoint)
        assert loaded.first.moe_lora_experts["default"].r == 2
        x = torch.rand(2, 6)
        assert torch.equal(loaded(x), model(x))

    def test_a_kill_while_saving_leaves_the_previous_checkpoint(self, make_mlp, checkpoint):
        before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
        program = f"""
import os, signal, torch
import moe_lora, moe_lora.safetensors_io
from moe_lora.save_and_load import save_adapter
from peft import get_peft_model

def half(tensors, path, metadata):
    path.write_bytes(b"half")
    print("writing", flush=True)
    signal.pause()

moe_lora.safetensors_io.save_file = half
model = torch.nn.Sequential(torch.nn.Linear(6, 6))
model = get_peft_model(model, moe_lora.MoELoraConfig(target_modules=["0"]))
save_adapter(model, {str(checkpoint)!r})
"""
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"writing\n"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        after = {p.name: p.read_bytes() for p in checkpoint.iterdir() if p.is_file()}
        assert after == before
        model = make_mlp()
        load_adapter(model, checkpoint)

    def test_what_cannot_be_saved_raises_before_anything_is_written(self, make_mlp, tmp_path):
        folder = tmp_path / "new"
        model = get_peft_model(make_mlp(), config())
        with pytest.raises(ValueError, match=r"one of \['default'\], but got 'other'"):
            save_adapter(model, folder, "other")
        with pytest.raises(ValueError, match="Expected a model with a moe_lora adapter"):
            save_adapter(make_mlp(), folder)
        hollow = get_peft_model(make_mlp(), config(), low_cpu_mem_usage=True)
        with pytest.raises(ValueError, match="on the meta device"):
            save_adapter(hollow, folder)
        assert not folder.exists()


class TestLoading:
    @pytest.mark.parametrize("is_trainable", [True, False])
    @pytest.mark.parametrize("start", ["base", "peft", "injected", "wrapped"])
    def test_what_was_saved_is_loaded_into_any_model(
        self, make_mlp, checkpoint, start, is_trainable
    ):
        source = make_mlp()
        load_adapter(source, checkpoint)
        x = torch.rand(2, 6)
        model = make_mlp()
        if start == "peft":
            model = get_peft_model(model, config(r=2))
        elif start in ("injected", "wrapped"):
            load_adapter(model, checkpoint, "default", is_trainable=True)
        target = torch.nn.ModuleDict({"inner": model}) if start == "wrapped" else model
        before = {n: p.requires_grad for n, p in target.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_adapter(target, checkpoint, "other", is_trainable=is_trainable)
        new = {n: p.requires_grad for n, p in target.named_parameters() if ".other" in n}
        assert new == dict.fromkeys(new, is_trainable)
        if start == "peft":
            assert model.active_adapter == "default"
            assert {n: p.requires_grad for n, p in target.named_parameters() if n in before} == (
                before
            )
            model.set_adapter("other")
        assert torch.equal(model(x), source(x))

    def test_the_next_step_is_that_of_an_uninterrupted_run(self, make_mlp, tmp_path):
        x = torch.rand(4, 6)

        def step(model, optimizer):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        def adam(model):
            return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)

        model = get_peft_model(make_mlp(), config())
        optimizer = adam(model)
        step(model, optimizer)
        save_adapter(model, tmp_path)
        state = copy.deepcopy(optimizer.state_dict())
        resumed = make_mlp()
        load_adapter(resumed, tmp_path, is_trainable=True)
        second = adam(resumed)
        second.load_state_dict(state)
        step(model, optimizer)
        step(resumed, second)
        found = {n: p for n, p in resumed.named_parameters() if p.requires_grad}
        for name, parameter in model.base_model.model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(found.pop(name), parameter), name
        assert not found
