"""The switches of diffusers' pipelines."""

from __future__ import annotations

import tempfile
from typing import Any

import peft
import torch
from compatibility.case import ALL, case
from compatibility.stage import Stage, config_of
from tiny_models import tiny_flux_fill

import moe_lora


def pipeline(stage: Stage, without: str | None = None, *, hotswap: bool = False) -> Any:
    """Return a pipeline whose adapters were loaded in the stage's order, LoRAs by its loader."""
    pipe = tiny_flux_fill(transformer=stage.build(), vae=None)
    if hotswap:
        pipe.enable_lora_hotswap(target_rank=8)
    added = [name for name in stage.order if name != without]
    for name in added:
        load(stage, pipe, name)
    pipe.set_adapters(added)
    return pipe


def load(stage: Stage, pipe: Any, name: str, **kwargs: Any) -> None:
    if name == "mix":
        pipe.transformer.add_adapter(config_of(name), adapter_name=name)
        stage.put(pipe.transformer, name)
        return
    tensors = {f"transformer.{key}": tensor for key, tensor in stage.state_dict(name).items()}
    pipe.load_lora_weights(tensors, adapter_name=name, **kwargs)


@case(
    "diffusers", "pipe.save_lora_weights", note="For plain LoRAs. Save mixtures with save_adapter."
)
def save_lora_weights(stage: Stage) -> None:
    pipe = pipeline(stage)
    tensors = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_lora_weights(folder, transformer_lora_layers=tensors)
        pipe.delete_adapters("style")
        pipe.load_lora_weights(folder, adapter_name="style")
    pipe.set_adapters(list(ALL))
    stage.check(pipe.transformer, ALL)


@case("diffusers", "pipe.load_lora_weights", note="Loads plain LoRAs before and after the mixture.")
def load_lora_weights(stage: Stage) -> None:
    pipe = pipeline(stage)
    stage.check(pipe.transformer, ALL)
    assert pipe.get_active_adapters() == list(stage.order)
    pipe.delete_adapters("turbo")
    load(stage, pipe, "turbo")
    pipe.set_adapters(list(ALL))
    stage.check(pipe.transformer, ALL)


@case("diffusers", "pipe.load_lora_weights without a name")
def load_without_a_name(stage: Stage) -> None:
    pipe = pipeline(stage, without="style")
    pipe.load_lora_weights({f"transformer.{k}": v for k, v in stage.state_dict("style").items()})
    (name,) = set(pipe.transformer.peft_config) - set(ALL)
    pipe.set_adapters(["mix", "turbo", name])
    stage.check(pipe.transformer, ALL)


@case("diffusers", "pipe.load_lora_weights(hotswap=True)", note="Swaps plain LoRAs.")
def hotswap(stage: Stage) -> None:
    pipe = pipeline(stage)
    doubled = {f"transformer.{k}": v * 2**0.5 for k, v in stage.state_dict("turbo").items()}
    pipe.load_lora_weights(doubled, adapter_name="turbo", hotswap=True)
    stage.check(pipe.transformer, {**ALL, "turbo": 2.0})


@case("diffusers", "pipe.enable_lora_hotswap", note="Pads plain LoRAs only.")
def enable_lora_hotswap(stage: Stage) -> None:
    if stage.order[0] == "mix":
        return hotswap_after_the_mixture(stage)
    pipe = pipeline(stage, hotswap=True)
    stage.check(pipe.transformer, ALL)
    doubled = {f"transformer.{k}": v * 2**0.5 for k, v in stage.state_dict("turbo").items()}
    pipe.load_lora_weights(doubled, adapter_name="turbo", hotswap=True)
    stage.check(pipe.transformer, {**ALL, "turbo": 2.0})
    return None


def hotswap_after_the_mixture(stage: Stage) -> None:
    pipe = pipeline(stage, hotswap=True)
    stage.check(pipe.transformer, ALL)


@case("diffusers", "pipe.set_adapters, by component and block")
def pipe_set_adapters(stage: Stage) -> None:
    pipe = pipeline(stage)
    by_block = {"single_transformer_blocks": 0.25, "transformer_blocks": 2.0}
    pipe.set_adapters(["mix", "style"], [{"transformer": by_block}, 0.5])

    def strength(path: str) -> float:
        return 0.25 if path.startswith("single") else 2.0

    stage.check(pipe.transformer, {"mix": strength, "style": 0.5})


@case("diffusers", "pipe.get_active_adapters, get_list_adapters")
def get_adapters(stage: Stage) -> None:
    pipe = pipeline(stage)
    pipe.set_adapters(["style", "mix"])
    assert pipe.get_active_adapters() == ["style", "mix"]
    assert set(pipe.get_list_adapters()["transformer"]) == set(ALL)


@case(
    "diffusers",
    "pipe.set_lora_device",
    note="Moves the experts. The router stays and works where it is.",
)
def set_lora_device(stage: Stage) -> None:
    pipe = pipeline(stage)
    pipe.set_lora_device(["turbo", "mix"], "cpu")
    stage.check(pipe.transformer, ALL)
    pipe.set_lora_device(["mix"], "meta")
    assert all(p.is_meta for n, p in pipe.transformer.named_parameters() if "experts" in n)
    pipe.set_adapters(["turbo", "style"])
    stage.check(pipe.transformer, {"turbo": 1.0, "style": 1.0})


@case("diffusers", "pipe.disable_lora, enable_lora")
def pipe_disable_lora(stage: Stage) -> None:
    pipe = pipeline(stage)
    pipe.disable_lora()
    stage.check(pipe.transformer, {})
    pipe.enable_lora()
    stage.check(pipe.transformer, ALL)


@case("diffusers", "pipe.fuse_lora, unfuse_lora, uniform")
def pipe_fuse_lora(stage: Stage) -> None:
    pipe = pipeline(stage)
    moe_lora.set_routing_mode(pipe.transformer, "uniform")
    uniform = torch.full_like(stage.weights, 1 / 3)
    pipe.fuse_lora(components=["transformer"])
    assert pipe.fused_loras == set(ALL)
    stage.check(pipe.transformer, ALL, uniform)
    pipe.unfuse_lora(components=["transformer"])
    stage.check(pipe.transformer, ALL, uniform)
    pipe.disable_lora()
    stage.check(pipe.transformer, {})


@case("diffusers", "pipe.unload_lora_weights", note="Removes the mixture as well.")
def unload_lora_weights(stage: Stage) -> None:
    pipe = pipeline(stage)
    pipe.unload_lora_weights()
    stage.check(pipe.transformer, {})
    load(stage, pipe, "mix")
    load(stage, pipe, "style")
    pipe.set_adapters(["mix", "style"])
    stage.check(pipe.transformer, {"mix": 1.0, "style": 1.0})


@case("diffusers", "pipe.delete_adapters")
def pipe_delete_adapters(stage: Stage) -> None:
    pipe = pipeline(stage)
    pipe.delete_adapters(["turbo", "mix"])
    stage.check(pipe.transformer, {"style": 1.0})
