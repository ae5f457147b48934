"""The switches of diffusers' models."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from compatibility.case import ALL, case, layers, trainable
from compatibility.stage import Stage, config_of
from diffusers.hooks import layerwise_casting as casting
from diffusers.loaders import lora_base
from safetensors.torch import load_file

import moe_lora


@case("diffusers", "model.add_adapter")
def add_adapter(stage: Stage) -> None:
    stage.check(stage.model(), ALL)


@case(
    "diffusers",
    "model.set_adapter",
    note="Freezes and trains the router together with its experts.",
)
def set_adapter(stage: Stage) -> None:
    model = stage.model()
    for names in (["mix"], ["style"], ["turbo", "mix"], ["turbo", "style"]):
        model.set_adapter(names)
        stage.check(model, dict.fromkeys(names, 1.0))
        assert trainable(model) == ({"mix", "mix router"} if "mix" in names else set())


@case("diffusers", "model.set_adapters", note="A strength scales a mixture as it scales a LoRA.")
def set_adapters(stage: Stage) -> None:
    model = stage.model()
    for strengths in ({"mix": 0.3, "style": -0.5}, {"turbo": 2.0, "mix": 0.0}, ALL):
        model.set_adapters(list(strengths), list(strengths.values()))
        stage.check(model, strengths)


@case("diffusers", "model.set_adapters by block")
def set_adapters_by_block(stage: Stage) -> None:
    model = stage.model()
    by_block = {"single_transformer_blocks": 0.25, "transformer_blocks": 2.0}
    model.set_adapters(["mix", "turbo", "style"], [by_block, 0.5, dict(by_block)])

    def strength(path: str) -> float:
        return 0.25 if path.startswith("single") else 2.0

    stage.check(model, {"mix": strength, "turbo": 0.5, "style": strength})


@case("diffusers", "model.active_adapters")
def active_adapters(stage: Stage) -> None:
    model = stage.model()
    model.set_adapter(["turbo", "mix"])
    assert model.active_adapters() == ["turbo", "mix"]


def switched_off_and_on(stage: Stage, off: str, on: str) -> None:
    model = stage.model()
    getattr(model, off)()
    stage.check(model, {})
    assert not trainable(model)
    getattr(model, on)()
    stage.check(model, ALL)
    assert trainable(model) == {"mix", "mix router"}


@case("diffusers", "model.disable_adapters, enable_adapters")
def disable_adapters(stage: Stage) -> None:
    switched_off_and_on(stage, "disable_adapters", "enable_adapters")


@case("diffusers", "model.disable_lora, enable_lora")
def disable_lora(stage: Stage) -> None:
    switched_off_and_on(stage, "disable_lora", "enable_lora")


@case("diffusers", "model.delete_adapters", note="Deletes the router together with its experts.")
def delete_adapters(stage: Stage) -> None:
    for gone in ALL:
        model = stage.model()
        model.delete_adapters(gone)
        stage.check(model, {name: 1.0 for name in ALL if name != gone})
        assert not any(f".{gone}." in name for name in model.state_dict())
        if gone == "mix":
            assert not any(layer.layer_index for layer in layers(model))
        load_again = config_of(gone)
        model.add_adapter(load_again, adapter_name=gone)
        stage.put(model, gone)
        model.set_adapters(list(ALL))
        stage.check(model, ALL)


@case(
    "diffusers",
    "model.fuse_lora, routed",
    "raises",
    "The weights depend on the input. Fuse in uniform mode, or use moe_lora.merge(model, weights).",
)
def fuse_lora_routed(stage: Stage) -> None:
    model = stage.model()
    model.set_adapters(list(ALL), [0.7, 1.0, 1.0])
    for names in (None, ["mix"], ["style", "mix"]):
        with pytest.raises(ValueError, match="computes them from the"):
            model.fuse_lora(lora_scale=0.5, adapter_names=names)
    stage.check(model, {**ALL, "mix": 0.7})
    with pytest.raises(ValueError, match="computes them from the"):
        lora_base.fuse_text_encoder_lora(model, lora_scale=0.5, adapter_names=["mix"])
    for layer in layers(model):
        experts = layer.moe_lora_experts["mix"]
        assert experts.scaling == pytest.approx(0.7 * experts.base_scaling)


@case("diffusers", "model.fuse_lora, unfuse_lora, uniform")
def fuse_lora_uniform(stage: Stage) -> None:
    model = stage.model()
    moe_lora.set_routing_mode(model, "uniform")
    uniform = torch.full_like(stage.weights, 1 / 3)
    model.fuse_lora(lora_scale=0.5)
    stage.check(model, dict.fromkeys(ALL, 0.5), uniform)
    model.unfuse_lora()
    model.disable_adapters()
    stage.check(model, {})
    model.enable_adapters()
    model.set_adapters(list(ALL))
    stage.check(model, ALL, uniform)


@case("diffusers", "model.unload_lora", note="Removes the mixture as well.")
def unload_lora(stage: Stage) -> None:
    model = stage.model()
    model.unload_lora()
    stage.check(model, {})
    assert model.state_dict().keys() == stage.build().state_dict().keys()
    assert not model._forward_pre_hooks


@case(
    "diffusers", "model.load_lora_adapter", note="Loads plain LoRAs before and after the mixture."
)
def load_lora_adapter(stage: Stage) -> None:
    for name in ("turbo", "style"):
        model = stage.model(without=name)
        model.load_lora_adapter(stage.state_dict(name), prefix=None, adapter_name=name)
        model.set_adapters(list(ALL))
        stage.check(model, ALL)


@case(
    "diffusers", "model.save_lora_adapter", note="For plain LoRAs. Save mixtures with save_adapter."
)
def save_lora_adapter(stage: Stage) -> None:
    model = stage.model()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("turbo", "style"):
            model.save_lora_adapter(folder, name)
            stored = load_file(Path(folder) / "pytorch_lora_weights.safetensors")
            assert stored.keys() == stage.state_dict(name).keys()


@case("diffusers", 'joint_attention_kwargs={"scale": ...}')
def attention_kwargs(stage: Stage) -> None:
    model = stage.model()
    for scale in (0.3, 0.7, 2.0):
        stage.check(model, dict.fromkeys(ALL, scale), joint_attention_kwargs={"scale": scale})
        stage.check(model, ALL)
    stage.check(model, {}, joint_attention_kwargs={"scale": 0.0})
    stage.check(model, ALL)
    model.set_adapters(list(ALL), [0.3, 0.5, 0.7])
    before = {layer: layer.moe_lora_experts["mix"].scaling for layer in layers(model)}
    for _ in range(20):
        stage(model, joint_attention_kwargs={"scale": 0.7})
    assert all(layer.moe_lora_experts["mix"].scaling == before[layer] for layer in before)


@case("diffusers", "model.enable_layerwise_casting", note="Experts and router stay in float32.")
def enable_layerwise_casting(stage: Stage) -> None:
    for dtype, error in ((torch.bfloat16, 0.02), (torch.float8_e4m3fn, 0.2)):
        model = stage.model()
        expected = stage(model)
        model.enable_layerwise_casting(dtype, torch.float32)
        kept = {p.dtype for name, p in model.named_parameters() if "moe_lora_" in name}
        assert kept == {torch.float32}
        assert model.transformer_blocks[0].attn.to_q.get_base_layer().weight.dtype == dtype
        assert (stage(model) - expected).norm() < error * expected.norm()


@case(
    "diffusers",
    "apply_layerwise_casting",
    "raises",
    'Routers need float32. Leave them out with skip_modules_pattern=("moe_router", ...).',
)
def layerwise_casting_function(stage: Stage) -> None:
    model = stage.model()
    casting.apply_layerwise_casting(model, torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="Expected routers in float32"):
        stage(model)
    model = stage.model()
    pattern = (*casting.DEFAULT_SKIP_MODULES_PATTERN, "moe_router")
    casting.apply_layerwise_casting(model, torch.bfloat16, torch.float32, pattern)
    assert stage(model).isfinite().all()


@case(
    "diffusers",
    "model.enable_gradient_checkpointing",
    note="Also after unload_lora and a new adapter.",
)
def enable_gradient_checkpointing(stage: Stage) -> None:
    model, gradients = stage.model(), []
    model.set_adapter(["mix"])
    for again in (False, True, True):
        if again:
            model.enable_gradient_checkpointing()
            model.unload_lora()
            model.add_adapter(config_of("mix"), adapter_name="mix")
            stage.put(model, "mix")
        model.zero_grad()
        model(**stage.inputs)[0].square().mean().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        gradients.append({n.replace(".base_layer.", "."): g for n, g in trained.items()})
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)
