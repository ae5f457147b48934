"""Checkpoints that are written at once, cut short, edited, or written by other tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moe_lora
from moe_lora import MoELoraConfig, load_adapter, save_adapter, save_experts
from moe_lora.cli import main
from moe_lora.safetensors_io import TEMPORARY, updating, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"


def mixture(make_mlp, value=None, **fields):
    given = {"target_modules": ["first", "second"], "r": 2, "init_lora_weights": False}
    model = get_peft_model(make_mlp(), MoELoraConfig(**{**given, **fields}))
    if value is not None:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.fill_(value)
    return model


# Starts pairs of writers, kills both at some moment, and looks at what they leave.
WRITERS = """
import os, random, signal, sys, time
import torch
from peft import get_peft_model
import moe_lora

folder, targets = sys.argv[1], ["0", "1"]

def base():
    return torch.nn.Sequential(torch.nn.Linear(6, 400), torch.nn.Linear(400, 6))

def make(rank):
    config = moe_lora.MoELoraConfig(target_modules=targets, r=rank, lora_alpha=rank)
    model = get_peft_model(base(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.fill_(float(rank))
    return model

def write(models):
    while True:
        for model in models:
            moe_lora.save_adapter(model, folder)
            moe_lora.save_experts(model, folder)

models = [make(1), make(2)]
moe_lora.save_adapter(models[0], folder)
for _ in range(8):
    writers = []
    for order in (models, models[::-1]):
        writer = os.fork()
        if not writer:
            write(order)
        writers.append(writer)
    for writer in writers:
        time.sleep(random.uniform(0.1, 0.3))
        os.kill(writer, signal.SIGKILL)
        _, status = os.waitpid(writer, 0)
        assert os.WIFSIGNALED(status), "a writer failed by itself"
    loaded = base()
    moe_lora.load_adapter(loaded, folder)
    experts = loaded[0].moe_lora_experts["default"]
    assert (experts.lora_A == experts.r).all(), (experts.lora_A, experts.r)
    assert experts.lora_alpha == experts.r
"""


def edit(folder, **entries):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.slow
class TestAtOnce:
    def test_threads_that_save_into_one_folder_leave_one_whole_checkpoint(self, make_mlp, tmp_path):
        models = [mixture(make_mlp, float(i), r=i, lora_alpha=i) for i in range(1, 5)]
        problems = []

        def save(model):
            try:
                for _ in range(8):
                    save_adapter(model, tmp_path)
                    save_experts(model, tmp_path / "experts")
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=save, args=[model]) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not problems
        assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS, "experts"]
        loaded = make_mlp()
        load_adapter(loaded, tmp_path)
        experts = loaded.first.moe_lora_experts["default"]
        assert (experts.lora_A == experts.r).all()
        for folder in (tmp_path / "experts").iterdir():
            assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
            plain = PeftModel.from_pretrained(make_mlp(), folder).base_model.model.first
            assert (plain.lora_A["default"].weight == plain.r["default"]).all()
            assert plain.lora_alpha["default"] == plain.r["default"]

    def test_threads_that_write_one_file_leave_one_whole_file(self, tmp_path):
        path = tmp_path / "one.safetensors"

        def write(value):
            for _ in range(20):
                write_tensors(path, {"x": torch.full((1000,), value)})

        threads = [threading.Thread(target=write, args=[float(i)]) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.listdir(tmp_path) == [path.name]
        assert load_file(path)["x"].unique().numel() == 1

    @pytest.mark.skipif(os.name != "posix", reason="forks and kills as POSIX does")
    def test_killed_and_living_writers_leave_one_whole_checkpoint(self, make_mlp, tmp_path):
        folder = tmp_path / "saved"
        command = [sys.executable, "-c", WRITERS, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        for save in (save_adapter, save_experts):
            save(mixture(make_mlp, 3.0, r=3), folder)
        assert not list(folder.rglob(".*"))

    def test_a_kill_at_every_step_of_a_save_leaves_the_old_checkpoint_or_the_new_one(
        self, make_mlp, tmp_path, monkeypatch
    ):
        old, new = mixture(make_mlp, 1.0, r=1), mixture(make_mlp, 2.0, r=2, lora_alpha=3)

        class Killed(BaseException):
            pass

        found = set()
        for count in range(20):
            folder = save_adapter(old, tmp_path / str(count))
            steps = 0
            for owner, name in ((os, "replace"), (Path, "unlink")):
                call = getattr(owner, name)

                def step(*args, call=call, last=count, **kwargs):
                    nonlocal steps
                    steps += 1
                    if steps > last:
                        raise Killed
                    return call(*args, **kwargs)

                monkeypatch.setattr(owner, name, step)
            try:
                save_adapter(new, folder)
                done = True
            except Killed:
                done = False
            monkeypatch.undo()
            loaded = make_mlp()
            load_adapter(loaded, folder)
            experts = loaded.first.moe_lora_experts["default"]
            assert (experts.lora_A == experts.r).all()
            assert experts.lora_alpha == {1: 8, 2: 3}[experts.r]
            found.add(experts.r)
            if done:
                assert experts.r == 2
                break
        assert done
        assert found == {1, 2}

    def test_only_our_temporary_folders_are_swept(self, tmp_path):
        ours = tmp_path / f"{TEMPORARY}killed"
        others = [tmp_path / ".saving-theirs", tmp_path / f"{TEMPORARY}file", tmp_path / ".cache"]
        for folder in (ours, others[0], others[2]):
            (folder / "inner").mkdir(parents=True)
        others[1].write_text("mine")
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(1)})
        assert not ours.exists()
        assert all(other.exists() for other in others)

    @pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX alone")
    def test_another_process_is_waited_for_and_its_temporary_folder_is_not_swept(self, tmp_path):
        program = f"""
import pathlib, time
from moe_lora.safetensors_io import updating
with updating(pathlib.Path({str(tmp_path)!r})) as temporary:
    print("inside", flush=True)
    time.sleep(1)
    (temporary / "slow").write_text("1")
"""
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            assert writer.stdout.readline() == b"inside\n"
            with updating(tmp_path) as temporary:
                assert (tmp_path / "slow").exists()
                (temporary / "quick").write_text("2")
            assert writer.wait() == 0
        assert sorted(os.listdir(tmp_path)) == ["quick", "slow"]

    def test_another_thread_is_waited_for(self, tmp_path):
        inside = threading.Event()

        def slow():
            with updating(tmp_path) as temporary:
                inside.set()
                time.sleep(0.2)
                (temporary / "slow").write_text("1")

        thread = threading.Thread(target=slow)
        thread.start()
        inside.wait()
        with updating(tmp_path):
            assert (tmp_path / "slow").exists()
        thread.join()


class TestEdited:
    @pytest.mark.parametrize(
        "entries",
        [
            {"lora_alpha": 2},
            {"use_rslora": True},
            {"alpha_pattern": {"first": 2}},
            {"expert_names": ["completion_expert", "background_expert", "removal_expert"]},
            {"routing_strategy": "hard"},
            {"routing_temperature": 0.1},
        ],
    )
    def test_a_config_that_means_other_weights_is_refused_everywhere(
        self, make_mlp, tmp_path, entries, capsys
    ):
        folder = save_adapter(mixture(make_mlp), tmp_path / "saved")
        edit(folder, **entries)
        message = f"the config that the weights were saved with, but its `{next(iter(entries))}` is"
        with pytest.raises(ValueError, match=message):
            load_adapter(make_mlp(), folder)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(make_mlp(), folder)
        assert main(["export", str(folder), str(tmp_path / "out"), "--weights", "uniform"]) == 1
        assert f"its `{next(iter(entries))}` is" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "entries",
        [
            {"inference_mode": False},
            {"base_model_name_or_path": "elsewhere"},
            {"lora_dropout": 0.5},
            {"expert_dropout": 0.5},
            {"routing_mode": "uniform"},
            {"revision": "main"},
            {"peft_version": "0.1"},
            {"target_modules": ["second", "first"]},
            {"from_the_future": 1},
        ],
    )
    def test_an_edit_that_leaves_the_weights_their_meaning_loads(self, make_mlp, tmp_path, entries):
        model = mixture(make_mlp)
        folder = save_adapter(model, tmp_path)
        edit(folder, **entries)
        loaded = make_mlp()
        load_adapter(loaded, folder)
        x = torch.rand(2, 6)
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x))

    def test_stock_checkpoints_know_of_no_config_and_load(self, make_mlp, tmp_path):
        model = mixture(make_mlp)
        save_adapter(mixture(make_mlp, r=5, lora_alpha=5), tmp_path)
        model.save_pretrained(tmp_path)  # over ours
        loaded = make_mlp()
        load_adapter(loaded, tmp_path)
        x = torch.rand(2, 6)
        assert torch.equal(loaded(x), model(x))

    def test_weights_of_our_own_are_a_checkpoint_by_themselves(self, make_mlp, tmp_path):
        model = mixture(make_mlp)
        (save_adapter(model, tmp_path) / CONFIG).unlink()
        loaded = make_mlp()
        load_adapter(loaded, tmp_path)
        x = torch.rand(2, 6)
        assert torch.equal(loaded(x), model(x))

    @pytest.mark.parametrize("note", ["{", "[1]", '{"peft_type": "LORA"}', '{"r": "8"}'])
    def test_a_header_that_is_no_config_is_refused(self, make_mlp, tmp_path, note):
        folder = save_adapter(mixture(make_mlp), tmp_path)
        (folder / CONFIG).unlink()
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"moe_lora_config": note})
        with pytest.raises(ValueError, match=r"Expected (JSON|a JSON|a MOE_LORA)"):
            load_adapter(make_mlp(), folder)

    def test_a_file_that_asks_for_much_memory_is_refused_before_it_is_taken(
        self, make_mlp, tmp_path
    ):
        folder = save_adapter(mixture(make_mlp), tmp_path)
        edit(folder, r=65536, expert_names=[f"e{i}" for i in range(1024)], num_experts=1024)
        with pytest.raises(ValueError, match="rank, experts or router"):
            load_adapter(make_mlp(), folder)


class TestDtypes:
    def bases(self, make_flux):
        bf16 = make_flux().to(torch.bfloat16)
        fp8 = make_flux().to(torch.bfloat16)
        fp8.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        return {"bf16": bf16, "fp8": fp8}

    @pytest.fixture
    def folder(self, make_flux, tmp_path):
        model = make_flux()
        model.add_adapter(
            MoELoraConfig(
                target_modules=["to_q", "ff.net.2"],
                router="three_expert_removal",
                init_lora_weights=False,
            )
        )
        return save_adapter(model, tmp_path / "saved")

    @pytest.mark.parametrize("base", ["bf16", "fp8"])
    @pytest.mark.parametrize("how", ["trainable", "inference", "peft", "peft adapter"])
    def test_experts_are_as_precise_as_peft_makes_them(
        self, make_flux, make_flux_inputs, folder, tmp_path, base, how
    ):
        model = self.bases(make_flux)[base]
        if how == "peft":
            PeftModel.from_pretrained(model, folder)
        elif how == "peft adapter":
            fresh = MoELoraConfig(target_modules=["to_q"])
            load_adapter(get_peft_model(model, fresh, "first"), folder)
        else:
            load_adapter(model, folder, is_trainable=how == "trainable")
        experts = {p.dtype for n, p in model.named_parameters() if "experts.default" in n}
        routers = {p.dtype for n, p in model.named_parameters() if "routers.default" in n}
        half = how == "inference" and base == "bf16"
        assert experts == {torch.bfloat16 if half else torch.float32}
        assert routers == {torch.float32}
        if not half:
            again = load_file(save_adapter(model, tmp_path / "again") / WEIGHTS)
            saved = load_file(folder / WEIGHTS)
            assert all(torch.equal(again[name], saved[name]) for name in saved)
        if how in ("trainable", "inference"):
            inputs = make_flux_inputs()
            inputs = {
                n: x if n.endswith("ids") else x.to(torch.bfloat16) for n, x in inputs.items()
            }
            assert model(**inputs)[0].isfinite().all()

    def test_a_new_adapter_on_an_8_bit_base_is_float32(self, make_flux):
        model = self.bases(make_flux)["fp8"]
        model.add_adapter(MoELoraConfig(target_modules=["to_q"]))
        assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}

    @pytest.mark.parametrize(
        "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float64]
    )
    def test_files_of_other_dtypes_are_cast(self, make_mlp, tmp_path, dtype):
        model = mixture(make_mlp)
        folder = save_adapter(model, tmp_path)
        tensors = {n: t.to(dtype) for n, t in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS)
        loaded = make_mlp()
        load_adapter(loaded, folder)
        found = loaded.first.moe_lora_experts["default"].lora_A
        assert found.dtype == torch.float32
        wanted = tensors["base_model.model.first.moe_lora_experts.lora_A"].to(torch.float32)
        assert torch.equal(found, wanted)
        assert main(["inspect", str(folder)]) == 0
        assert main(["export", str(folder), str(tmp_path / "out"), "--weights", "uniform"]) == 0

    def test_experts_of_no_floats_are_refused(self, make_mlp, tmp_path):
        folder = save_adapter(mixture(make_mlp), tmp_path)
        for dtype in (torch.int32, torch.complex64):
            tensors = {n: t.to(dtype) for n, t in load_file(folder / WEIGHTS).items()}
            save_file(tensors, folder / WEIGHTS)
            with pytest.raises(ValueError, match="floating-point experts"):
                load_adapter(make_mlp(), folder)


class TestFilesOfDiffusers:
    @pytest.fixture
    def model(self, make_flux):
        model = make_flux()
        model.add_adapter(
            MoELoraConfig(
                r=4,
                lora_alpha=6,
                target_modules=["to_q", "ff.net.2"],
                router="three_expert_removal",
                init_lora_weights=False,
            )
        )
        return model.eval()

    @pytest.mark.parametrize("by", ["model", "pipeline"])
    def test_a_mixture_that_diffusers_saved_is_loaded(
        self, model, make_flux, make_flux_inputs, tmp_path, by
    ):
        if by == "model":
            model.save_lora_adapter(tmp_path)
        else:
            from diffusers import FluxFillPipeline
            from diffusers.training_utils import _collate_lora_metadata

            FluxFillPipeline.save_lora_weights(
                tmp_path,
                transformer_lora_layers=get_peft_model_state_dict(model),
                **_collate_lora_metadata({"transformer": model}),
            )
        assert os.listdir(tmp_path) == [DIFFUSERS]
        loaded = make_flux().eval()
        load_adapter(loaded, tmp_path)
        inputs = make_flux_inputs()
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
        assert loaded.peft_config["default"].lora_alpha == 6

    def test_without_a_config_in_the_header_the_caller_gives_it(
        self, model, make_flux, make_flux_inputs, tmp_path
    ):
        save_file(get_peft_model_state_dict(model), tmp_path / DIFFUSERS)
        with pytest.raises(FileNotFoundError, match="or pass `config`"):
            load_adapter(make_flux(), tmp_path)
        given = model.peft_config["default"]
        loaded = make_flux().eval()
        load_adapter(loaded, tmp_path, config=given)
        inputs = make_flux_inputs()
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
        assert given.stored is None
        assert not given.inference_mode
        wrong = MoELoraConfig(r=2, target_modules=["to_q", "ff.net.2"])
        with pytest.raises(ValueError, match="to fit the model"):
            load_adapter(make_flux(), tmp_path, config=wrong)

    def test_a_plain_lora_is_sent_to_its_loader(self, make_flux, tmp_path):
        model = make_flux()
        model.add_adapter(LoraConfig(target_modules=["to_q"]))
        model.save_lora_adapter(tmp_path)
        with pytest.raises(ValueError, match="Load it with `load_lora_weights`"):
            load_adapter(make_flux(), tmp_path)

    def test_a_text_encoder_in_the_file_is_left_out(
        self, model, make_flux, make_flux_inputs, tmp_path
    ):
        model.save_lora_adapter(tmp_path)
        with safe_open(tmp_path / DIFFUSERS, "pt") as file:
            entries = json.loads(file.metadata()["lora_adapter_metadata"])
        told = {f"transformer.{name}": value for name, value in entries.items()}
        told |= {"text_encoder.peft_type": "LORA", "text_encoder.r": 2}
        tensors = {f"transformer.{n}": t for n, t in load_file(tmp_path / DIFFUSERS).items()}
        tensors["text_encoder.layer.lora_A.weight"] = torch.ones(2, 2)
        note = {"lora_adapter_metadata": json.dumps(told)}
        save_file(tensors, tmp_path / DIFFUSERS, note)
        loaded = make_flux().eval()
        load_adapter(loaded, tmp_path)
        inputs = make_flux_inputs()
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])


def test_the_note_is_the_config_of_the_folder(make_mlp, tmp_path):
    folder = save_adapter(mixture(make_mlp), tmp_path)
    with safe_open(folder / WEIGHTS, "pt") as file:
        note = file.metadata()["moe_lora_config"]
    assert note == (folder / CONFIG).read_text()
    assert moe_lora.MoELoraConfig.from_pretrained(folder).stored.differing is None
