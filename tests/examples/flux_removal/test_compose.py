"""Runs with experts from plain LoRA files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from two_processes import run_in_two_processes

import train
from options.parsing import parse_options

pytestmark = pytest.mark.slow

Arguments = Callable[..., list[str]]
RANKS = {"shadow": 2, "glow": 3}


@pytest.fixture(scope="module")
def files(random_flux_fill: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("loras")
    for name, r in RANKS.items():
        base = FluxTransformer2DModel.from_pretrained(random_flux_fill / "transformer")
        config = LoraConfig(r=r, target_modules=["to_q", "to_v"], init_lora_weights=False)
        get_peft_model(base, config).save_pretrained(folder / name)
    return [f"{name}={folder / name}" for name in RANKS]


def flags_of(arguments: Arguments, files: list[str], *words: str, **changed: object) -> list[str]:
    made = arguments(**changed)
    for name in ("--lora_r", "--lora_alpha"):
        place = made.index(name)
        del made[place : place + 2]
    return [*made, "--compose", *files, *words]


def run(flags: list[str]) -> Path:
    return train.train(parse_options(flags))


def factors(checkpoint: Path, index: int) -> dict[str, Tensor]:
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    return {
        name: tensor[index] if name.endswith("lora_A") else tensor[:, index]
        for name, tensor in tensors.items()
        if "moe_lora_experts" in name
    }


def saved_factors(pair: str) -> dict[str, Tensor]:
    tensors = load_file(Path(pair.partition("=")[2]) / "adapter_model.safetensors")
    return {
        name.replace(".lora_", ".moe_lora_experts.lora_").removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
    }


def is_as_in_its_file(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    # The scaling of the files, alpha / r, is folded into lora_B.
    r = next(iter(expected.values())).shape[0]
    same = []
    for name, tensor in expected.items():
        own = found[name]
        if name.endswith("lora_A"):
            same.append(torch.equal(own[:r], tensor))
        else:
            same.append(torch.equal(own[:, :r], tensor * (8 / r)) and not own[:, r:].any())
    return all(same)


def router_of(checkpoint: Path) -> list[Tensor]:
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    return [tensor for name, tensor in tensors.items() if "moe_lora_routers" in name]


def test_the_router_alone_is_trained_by_default(arguments: Arguments, files: list[str]) -> None:
    first, last = (
        run(flags_of(arguments, files, max_train_steps=n, output_dir=arguments()[5] + f"_{n}"))
        for n in (1, 3)
    )
    config = PeftConfig.from_pretrained(last)
    assert tuple(config.expert_names) == tuple(RANKS)
    assert config.router == "mask_aware"
    for index, pair in enumerate(files):
        assert is_as_in_its_file(factors(last, index), saved_factors(pair))
        assert (last / "experts" / pair.partition("=")[0]).is_dir()
    assert not all(map(torch.equal, router_of(first), router_of(last)))
    state = load_file(last / "training_state" / "optimizer.safetensors")
    assert state
    assert all("moe_lora_routers" in name for name in state)


def test_named_experts_are_trained_and_the_run_resumes(
    arguments: Arguments, files: list[str], tmp_path: Path
) -> None:
    words = ("--train_experts", "glow")
    options = {"max_train_steps": 4, "checkpointing_steps": 2, "weight_decay": 0.5}
    whole = run(flags_of(arguments, files, *words, **options, output_dir=tmp_path / "whole"))
    assert is_as_in_its_file(factors(whole, 0), saved_factors(files[0]))
    assert not is_as_in_its_file(factors(whole, 1), saved_factors(files[1]))

    halfway = whole.parent / "checkpoint-2"
    resumed = run(
        flags_of(
            arguments,
            files,
            *words,
            **options,
            output_dir=tmp_path / "resumed",
            resume_from_checkpoint=halfway,
        )
    )
    expected, found = (load_file(c / "adapter_model.safetensors") for c in (whole, resumed))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_uniform_weights_train_experts_without_a_router(
    arguments: Arguments, files: list[str]
) -> None:
    words = ("--train_experts", "shadow", "--routing", "never")
    checkpoint = run(flags_of(arguments, files, *words))
    assert router_of(checkpoint) == []
    assert is_as_in_its_file(factors(checkpoint, 1), saved_factors(files[1]))
    assert not is_as_in_its_file(factors(checkpoint, 0), saved_factors(files[0]))


def test_experts_stay_in_float32_beside_a_bfloat16_base(
    arguments: Arguments, files: list[str]
) -> None:
    checkpoint = run(flags_of(arguments, files, mixed_precision="bf16"))
    for index, pair in enumerate(files):
        assert is_as_in_its_file(factors(checkpoint, index), saved_factors(pair))


def test_two_processes_train_one_expert_and_the_router(
    arguments: Arguments, files: list[str], tmp_path: Path
) -> None:
    flags = flags_of(arguments, files, "--train_experts", "glow", batch_size=1)
    run_in_two_processes(train.__file__, *flags)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert is_as_in_its_file(factors(checkpoint, 0), saved_factors(files[0]))
    assert not is_as_in_its_file(factors(checkpoint, 1), saved_factors(files[1]))
