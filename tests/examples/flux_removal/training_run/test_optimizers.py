from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor, nn

import train
from options import optimizer_options
from options.parsing import parse_options
from training_run.optimizer_state import load_state, save_state
from training_run.optimizers import create_optimizer

Arguments = Callable[..., list[str]]

CASES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adafactor": {},
    "SGD": {"optimizer_kwargs": '{"momentum": 0.9}'},
    "NAdam": {},
    "Prodigy": {"learning_rate": 1.0, "optimizer_kwargs": '{"d0": 0.001}'},
    # The tensors of the tiny model are small; by default 4096 numbers are the least for 8 bits.
    "bnb.AdamW8bit": {"optimizer_kwargs": '{"min_8bit_size": 16}'},
    "bnb.Lion8bit": {"optimizer_kwargs": '{"min_8bit_size": 16}'},
    "AdamWScheduleFree": {"optimizer_kwargs": '{"warmup_steps": 2}'},
    "RAdamScheduleFree": {},
    "SGDScheduleFree": {},
}
PACKAGES = {"Prodigy": "prodigyopt"} | {
    name: "bitsandbytes" if name.startswith("bnb.") else "schedulefree"
    for name in CASES
    if name.startswith("bnb.") or name.endswith("ScheduleFree")
}


@pytest.fixture(params=CASES)
def optimizer(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return name


def everything(checkpoint: Path) -> dict[str, Tensor]:
    return {
        f"{file.relative_to(checkpoint)}/{name}": value
        for file in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.slow
def test_a_resumed_run_equals_the_uninterrupted_one(
    optimizer: str, arguments: Arguments, all_losses: dict[str, Any], tmp_path: Path
) -> None:
    given = all_losses | CASES[optimizer] | {"optimizer": optimizer, "uniform_steps": 1}

    def run(**changed: Any) -> Path:
        return train.train(parse_options(arguments(**(given | changed))))

    whole = run(max_train_steps=5, output_dir=tmp_path / "whole")
    first = run(max_train_steps=3)
    resumed = run(max_train_steps=5, resume_from_checkpoint="latest")
    found, wanted = everything(resumed), everything(whole)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    states = [(f / "training_state" / "state.json").read_text() for f in (resumed, whole)]
    assert states[0] == states[1]
    assert not list(whole.rglob("*.bin")) + list(whole.rglob("*.pt"))
    # The steps after the interruption changed both, so that the comparison compares something.
    weights = "adapter_model.safetensors"
    before = load_file(first / weights)
    after = load_file(whole / weights)
    assert any(not torch.equal(before[name], after[name]) for name in after if "experts" in name)
    assert any(not torch.equal(before[name], after[name]) for name in after if "router" in name)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--optimizer", "AdamX"], r"one of ASGD, .*AdamW.*Prodigy.*bnb\.AdamW8bit.*got AdamX"),
        (["--optimizer", "Muon"], "tensor of three dimensions"),
        (["--optimizer", "LBFGS"], "several times per step"),
        (["--optimizer_kwargs", '{"beta": 1}'], r"got beta\. The arguments are betas=.*eps="),
        (["--optimizer_kwargs", '{"betas": [2, 0.9]}'], "Invalid beta parameter"),
        (["--optimizer_kwargs", "[1]"], r"JSON object, but got \[1\]"),
        (["--optimizer_kwargs", "{x"], "JSON object, but got {x"),
        (["--optimizer_kwargs", '{"lr": 1}'], "--learning_rate instead of lr"),
        (["--optimizer_kwargs", '{"weight_decay": 1}'], "--weight_decay instead"),
        (["--optimizer", "Rprop", "--weight_decay", "0.1"], "no `weight_decay` with"),
        (["--ema_decay", "1"], r"`ema_decay` to be in \(0, 1\), but got 1"),
    ],
)
def test_unknown_optimizers_and_arguments_raise(flags: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_options(["--train_data_dir", "data", *flags])


@pytest.mark.parametrize(
    ("package", "flags", "told"),
    [
        ("bitsandbytes", ["--optimizer", "bnb.AdamX"], r"bnb\.AdamW8bit.*but got bnb\.AdamX"),
        ("bitsandbytes", ["--optimizer", "bnb.SGD8bit"], "SGD without momentum"),
        ("prodigyopt", ["--optimizer", "Prodigy"], "usually 1, but got the default of AdamW"),
        (
            "schedulefree",
            ["--optimizer", "AdamWScheduleFree", "--ema_decay", "0.9"],
            "averages the weights itself",
        ),
    ],
)
def test_refused_settings_of_other_packages(package: str, flags: list[str], told: str) -> None:
    pytest.importorskip(package)
    with pytest.raises(ValueError, match=told):
        parse_options(["--train_data_dir", "data", *flags])


def test_prodigy_has_one_step_size_for_all(all_losses: dict[str, Any]) -> None:
    pytest.importorskip("prodigyopt")
    flags = ["--optimizer", "Prodigy", "--learning_rate", "1", "--router_learning_rate", "0.1"]
    flags += [word for name, value in all_losses.items() for word in (f"--{name}", str(value))]
    with pytest.raises(ValueError, match="one step size for all parameters"):
        parse_options(["--train_data_dir", "data", *flags])


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("bnb.AdamW8bit", "bitsandbytes"),
        ("Prodigy", "prodigyopt"),
        ("AdamWScheduleFree", "schedulefree"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = optimizer_options.missing_package
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None)
    assert real(name) == package
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}$"):
        parse_options(["--train_data_dir", "data", "--optimizer", name])


def test_weight_decay_and_arguments_reach_the_optimizer() -> None:
    def created(name: str, **arguments: Any) -> dict[str, Any]:
        groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.5, "name": "experts"}]
        return create_optimizer(name, groups, arguments, 0.125).param_groups[0]

    found = created("SGD", momentum=0.25)
    assert (found["momentum"], found["weight_decay"], found["lr"]) == (0.25, 0.125, 0.5)
    assert "weight_decay" not in created("Rprop")


def test_the_router_keeps_its_learning_rate(
    arguments: Arguments, all_losses: dict[str, Any]
) -> None:
    options = parse_options(
        arguments(**all_losses, optimizer="Adafactor", router_learning_rate=0.5)
    )
    run = train.prepare(train.build_accelerator(options), options)
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
    assert rates == {"experts": 0.01, "router": 0.5}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4)


def step(optimizer: torch.optim.Optimizer, model: Net) -> None:
    model.layer(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def create(name: str, model: Net) -> torch.optim.Optimizer:
    groups = [{"params": list(model.parameters()), "lr": 1.0, "name": "experts"}]
    return create_optimizer(name, groups, {}, 0.0)


def test_the_state_is_tensors_and_json() -> None:
    pytest.importorskip("prodigyopt")
    model = Net()
    optimizer = create("Prodigy", model)
    for _ in range(4):
        step(optimizer, model)
    tensors, entries = save_state(optimizer, model)
    assert entries == json.loads(json.dumps(entries))
    assert entries["name"] == "prodigyopt.Prodigy"
    assert entries["scalars"]["step"] == {"layer.weight": 4, "layer.bias": 4}
    own = entries["groups"]["experts"]
    assert own["k"] == 4
    assert own["d"] > 1e-6  # grew from d0
    assert not own.keys() & {"lr", "betas", "d0", "params"}
    other = Net()
    other.load_state_dict(model.state_dict())
    again = create("Prodigy", other)
    load_state(again, other, load(save(tensors)), entries)
    step(optimizer, model)
    step(again, other)
    assert torch.equal(model.layer.weight, other.layer.weight)


def test_the_state_of_another_optimizer_raises() -> None:
    model = Net()
    optimizer = create("AdamW", model)
    step(optimizer, model)
    with pytest.raises(ValueError, match=r"torch\.AdamW, but got torch\.SGD"):
        load_state(create("SGD", model), model, *save_state(optimizer, model))
