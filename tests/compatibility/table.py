"""Every public switch of PEFT and diffusers, with a mixture and two plain LoRAs in the model."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import peft
import pytest
import torch
from compatibility.stage import Stage, config_of
from diffusers.hooks import layerwise_casting as casting
from diffusers.loaders import lora_base
from peft import get_layer_status, get_model_status
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn

import moe_lora
from moe_lora import MoELoraLinear

Works = Literal["yes", "raises", "not for mixtures"]
ALL = {"mix": 1.0, "turbo": 1.0, "style": 1.0}


@dataclass(frozen=True)
class Case:
    """Say whether a switch works beside a mixture, and show it.

    Attributes:
        library: "diffusers" or "PEFT".
        switch: its name, as users write it.
        works: "yes"; "raises" a clear error; "not for mixtures", where it leaves them alone.
        note: what a user should know; of what raises, the error.
        show: raises unless all of it is so.
    """

    library: Literal["diffusers", "PEFT"]
    switch: str
    works: Works
    note: str
    show: Callable[[Stage], None]


CASES: list[Case] = []


def case(library: Literal["diffusers", "PEFT"], switch: str, works: Works = "yes", note: str = ""):
    def add(show: Callable[[Stage], None]) -> Callable[[Stage], None]:
        CASES.append(Case(library, switch, works, note, show))
        return show

    return add


def trainable(model: nn.Module) -> set[str]:
    return {
        name.partition("moe_lora_experts.")[2].partition(".")[0]
        or name.partition("moe_lora_routers.")[2].partition(".")[0] + " router"
        for name, p in model.named_parameters()
        if p.requires_grad and "moe_lora_" in name
    }


def pipeline(stage: Stage, without: str | None = None, *, hotswap: bool = False) -> Any:
    """Return a pipeline whose adapters were loaded in the stage's order, LoRAs by its loader."""
    pipe = diffusers.FluxFillPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=stage.build(),
    )
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


@case("diffusers", "model.add_adapter")
def add_adapter(stage: Stage) -> None:
    stage.check(stage.model(), ALL)


@case("diffusers", "model.set_adapter", note="router and experts are frozen and trained together")
def set_adapter(stage: Stage) -> None:
    model = stage.model()
    for names in (["mix"], ["style"], ["turbo", "mix"], ["turbo", "style"]):
        model.set_adapter(names)
        stage.check(model, dict.fromkeys(names, 1.0))
        assert trainable(model) == ({"mix", "mix router"} if "mix" in names else set())


@case("diffusers", "model.set_adapters", note="strengths, of a mixture, too")
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


@case("diffusers", "model.delete_adapters", note="the router goes with its experts")
def delete_adapters(stage: Stage) -> None:
    for gone in ALL:
        model = stage.model()
        model.delete_adapters(gone)
        stage.check(model, {name: 1.0 for name in ALL if name != gone})
        assert not any(f".{gone}." in name for name in model.state_dict())
        if gone == "mix":
            assert not any(layer.places for layer in layers(model))
        load_again = config_of(gone)
        model.add_adapter(load_again, adapter_name=gone)
        stage.put(model, gone)
        model.set_adapters(list(ALL))
        stage.check(model, ALL)


def layers(model: nn.Module) -> list[MoELoraLinear]:
    return [module for module in model.modules() if isinstance(module, MoELoraLinear)]


@case(
    "diffusers",
    "model.fuse_lora, routed",
    "raises",
    "no single weight is a mixture that depends on the input: fuse a fixed one",
)
def fuse_lora_routed(stage: Stage) -> None:
    model = stage.model()
    model.set_adapters(list(ALL), [0.7, 1.0, 1.0])
    for names in (None, ["mix"], ["style", "mix"]):
        with pytest.raises(ValueError, match="chooses them for every"):
            model.fuse_lora(lora_scale=0.5, adapter_names=names)
    stage.check(model, {**ALL, "mix": 0.7})
    with pytest.raises(ValueError, match="chooses them for every"):
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


@case("diffusers", "model.unload_lora", note="takes the mixture, too")
def unload_lora(stage: Stage) -> None:
    model = stage.model()
    model.unload_lora()
    stage.check(model, {})
    assert model.state_dict().keys() == stage.build().state_dict().keys()
    assert not model._forward_pre_hooks


@case("diffusers", "model.load_lora_adapter", note="of plain LoRAs, in any order")
def load_lora_adapter(stage: Stage) -> None:
    for name in ("turbo", "style"):
        model = stage.model(without=name)
        model.load_lora_adapter(stage.state_dict(name), prefix=None, adapter_name=name)
        model.set_adapters(list(ALL))
        stage.check(model, ALL)


@case("diffusers", "model.save_lora_adapter", note="of plain LoRAs; mixtures: save_adapter")
def save_lora_adapter(stage: Stage) -> None:
    model = stage.model()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("turbo", "style"):
            model.save_lora_adapter(folder, name)
            stored = load_file(Path(folder) / "pytorch_lora_weights.safetensors")
            assert stored.keys() == stage.state_dict(name).keys()


@case("diffusers", "pipe.save_lora_weights", note="of plain LoRAs; mixtures: save_adapter")
def save_lora_weights(stage: Stage) -> None:
    pipe = pipeline(stage)
    tensors = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_lora_weights(folder, transformer_lora_layers=tensors)
        pipe.delete_adapters("style")
        pipe.load_lora_weights(folder, adapter_name="style")
    pipe.set_adapters(list(ALL))
    stage.check(pipe.transformer, ALL)


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


@case("diffusers", "model.enable_layerwise_casting", note="experts and router stay in float32")
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
    'a router stays in float32: leave it out with skip_modules_pattern=("moe_router", ...)',
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


@case("diffusers", "model.enable_gradient_checkpointing", note="after unload_lora, too")
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


@case("diffusers", "pipe.load_lora_weights", note="before and after the mixture")
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


@case("diffusers", "pipe.load_lora_weights(hotswap=True)", note="of plain LoRAs")
def hotswap(stage: Stage) -> None:
    pipe = pipeline(stage)
    doubled = {f"transformer.{k}": v * 2**0.5 for k, v in stage.state_dict("turbo").items()}
    pipe.load_lora_weights(doubled, adapter_name="turbo", hotswap=True)
    stage.check(pipe.transformer, {**ALL, "turbo": 2.0})


@case("diffusers", "pipe.enable_lora_hotswap", note="pads plain LoRAs only")
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


@case("diffusers", "pipe.set_lora_device", note="moves the experts; a router works where it is")
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


@case("diffusers", "pipe.unload_lora_weights", note="takes the mixture, too")
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


@case("PEFT", "inject_adapter_in_model, set_peft_model_state_dict")
def inject_adapter(stage: Stage) -> None:
    model = stage.build()
    for name in stage.order:
        peft.inject_adapter_in_model(config_of(name), model, name)
        stage.put(model, name)
    peft.functional.set_adapter(model, list(ALL))
    stage.check(model, ALL)


@case("PEFT", "get_peft_model_state_dict", note="the same keys, whatever is around the layers")
def get_state_dict(stage: Stage) -> None:
    for model in (stage.model(), stage.peft_model()):
        for name in ALL:
            if isinstance(model, peft.PeftModel) and name != "mix":
                continue
            found = peft.get_peft_model_state_dict(model, adapter_name=name)
            found = {key.removeprefix("base_model.model."): t for key, t in found.items()}
            expected = stage.state_dict(name)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in found)


@case("PEFT", "set_adapter")
def functional_set_adapter(stage: Stage) -> None:
    model = stage.model()
    peft.functional.set_adapter(model, ["style"])
    stage.check(model, {"style": 1.0})
    assert not trainable(model)
    peft.functional.set_adapter(model, ["mix"], inference_mode=True)
    stage.check(model, {"mix": 1.0})
    assert not trainable(model)


@case("PEFT", "delete_adapter")
def functional_delete_adapter(stage: Stage) -> None:
    model = stage.model()
    peft.functional.delete_adapter(model, "mix", prefix="moe_lora_")
    stage.check(model, {"turbo": 1.0, "style": 1.0})


@case("PEFT", "set_requires_grad", note="of experts and router")
def set_requires_grad(stage: Stage) -> None:
    for model, call in (
        (stage.model(), peft.functional.set_requires_grad),
        (stage.peft_model(), lambda m, *a, **k: m.set_requires_grad(*a, **k)),
    ):
        call(model, "mix", requires_grad=False)
        assert not trainable(model)
        call(model, ["mix", "turbo"])
        assert trainable(model) == {"mix", "mix router"}


@case("PEFT", "cast_adapter_dtype")
def cast_adapter_dtype(stage: Stage) -> None:
    model = stage.model().to(torch.bfloat16)
    peft.functional.cast_adapter_dtype(model, "mix")
    kept = {p.dtype for name, p in model.named_parameters() if "moe_lora_" in name}
    assert kept == {torch.float32}


@case("PEFT", "PeftModel.set_adapter", note="switches mixtures only, as it does for LoRAs")
def peft_set_adapter(stage: Stage) -> None:
    model = stage.peft_model()
    model.add_adapter("second", config_of("mix", init_lora_weights=True))
    model.set_adapter("second")
    stage.check(model, {"turbo": 1.0, "style": 1.0})
    assert trainable(model) == {"second", "second router"}
    model.set_adapter("mix")
    stage.check(model, ALL)


@case("PEFT", "PeftModel.disable_adapter")
def disable_adapter(stage: Stage) -> None:
    model = stage.peft_model()
    with model.disable_adapter():
        stage.check(model, {})
    stage.check(model, ALL)


@case("PEFT", "PeftModel.merge_adapter, unmerge_adapter")
def merge_adapter(stage: Stage) -> None:
    model = stage.peft_model()
    with pytest.raises(ValueError, match="chooses them for every"):
        model.merge_adapter()
    stage.check(model, ALL)
    moe_lora.set_routing_mode(model, "uniform")
    uniform = torch.full_like(stage.weights, 1 / 3)
    model.merge_adapter(safe_merge=True)
    stage.check(model, ALL, uniform)
    model.unmerge_adapter()
    stage.check(model, ALL, uniform)


@case("PEFT", "PeftModel.unload", note="leaves other tuners' LoRAs")
def unload(stage: Stage) -> None:
    model = stage.peft_model().unload()
    stage.check(model, {"turbo": 1.0, "style": 1.0})
    assert set(model.peft_config) == {"turbo", "style"}
    assert not any("moe_" in name for name, _ in model.named_modules())


@case("PEFT", "PeftModel.merge_and_unload", note="leaves other tuners' LoRAs")
def merge_and_unload(stage: Stage) -> None:
    model = stage.peft_model()
    moe_lora.set_routing_mode(model, "uniform")
    plain = model.merge_and_unload(safe_merge=True)
    stage.check(plain, ALL, torch.full_like(stage.weights, 1 / 3))
    peft.functional.set_adapter(plain, "style")
    stage.check(plain, {"mix": 1.0, "style": 1.0}, torch.full_like(stage.weights, 1 / 3))


@case("PEFT", "PeftModel.delete_adapter")
def peft_delete_adapter(stage: Stage) -> None:
    model = stage.peft_model()
    model.delete_adapter("mix")
    stage.check(model.base_model.model, {"turbo": 1.0, "style": 1.0})
    assert not list(model.base_model.model.moe_router.parameters())


@case(
    "PEFT",
    "PeftModel.forward(adapter_names=...)",
    "raises",
    "run the samples of each adapter by themselves, or weigh experts by sample with route",
)
def adapter_names(stage: Stage) -> None:
    model = stage.peft_model()
    with pytest.raises(ValueError, match="Expected no `adapter_names`"):
        stage(model, adapter_names=["mix", "__base__"])
    stage.check(model, ALL)
    with pytest.raises(TypeError, match="adapter_names"):
        layers(model)[0](torch.rand(2, layers(model)[0].in_features), adapter_names=["mix"] * 2)


@case("PEFT", "get_layer_status, get_model_status")
def status(stage: Stage) -> None:
    model = stage.model()
    found = get_layer_status(model)
    ours = [layer for layer in found if "mix" in layer.available_adapters]
    assert len(ours) == len(stage.paths["mix"])
    assert get_model_status(model).active_adapters == list(stage.order)
    assert get_model_status(stage.peft_model()).available_adapters == sorted(ALL)


@case("PEFT", "disable_input_dtype_casting", note="has no effect on a mixture")
def input_dtype_casting(stage: Stage) -> None:
    model = stage.model()
    with disable_input_dtype_casting(model):
        stage.check(model, ALL)


@case("PEFT", "rescale_adapter_scale", "not for mixtures", "scales plain LoRAs only")
def rescale(stage: Stage) -> None:
    model = stage.model()
    with rescale_adapter_scale(model, 0.5):
        stage.check(model, {"mix": 1.0, "turbo": 0.5, "style": 0.5})
    stage.check(model, ALL)


@case("PEFT", "hotswap_adapter", "raises", "PEFT swaps plain LoRAs only")
def peft_hotswap(stage: Stage) -> None:
    model = stage.peft_model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=["mix"])
        with pytest.raises(ValueError, match="Hotswapping only supports"):
            hotswap_adapter(model, f"{folder}/mix", "mix", torch_device="cpu")
    stage.check(model, ALL)


@case("PEFT", "PeftMixedModel", "raises", "adapters of several methods: inject them one by one")
def mixed_model(stage: Stage) -> None:
    base = stage.build()
    with pytest.raises(ValueError, match="MOE_LORA"):
        peft.PeftMixedModel(base, config_of("mix"), "mix")
    stage.check(base, {})


@case("PEFT", 'LoraConfig(target_modules="all-linear") beside a router', "raises", "exclude it")
def all_linear(stage: Stage) -> None:
    model = stage.model()
    config = peft.LoraConfig(r=2, target_modules="all-linear")
    peft.inject_adapter_in_model(config, model, "wide")
    with pytest.raises(ValueError, match="exclude_modules"):
        stage(model)
    model = stage.model()
    config.exclude_modules = ".*moe_router.*"
    peft.inject_adapter_in_model(config, model, "wide")
    model.set_adapter([*ALL, "wide"])
    stage.check(model, ALL)


@case("PEFT", "LoraModel.unload", note="takes the mixture, as all that is adapted")
def lora_unload(stage: Stage) -> None:
    model = stage.build()
    for name in ("mix", "turbo"):
        peft.inject_adapter_in_model(config_of(name), model, name)
        stage.put(model, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.get_peft_model(model, config_of("style"), "style")
    plain = lora.unload()
    stage.check(plain, {})
    assert plain.state_dict().keys() == stage.build().state_dict().keys()


@case("PEFT", "get_base_model_state_dict", note="the routers' tensors are in it, too")
def base_state_dict(stage: Stage) -> None:
    found = peft.get_base_model_state_dict(stage.peft_model())
    ours = {key for key in found if key.startswith("moe_router.")}
    assert found.keys() - ours == stage.build().state_dict().keys()


@case("PEFT", "copy.deepcopy of an adapted model")
def deepcopied(stage: Stage) -> None:
    model = stage.model()
    clone = copy.deepcopy(model)
    clone.set_adapter(["turbo"])
    assert trainable(model) == {"mix", "mix router"}
    assert not trainable(clone)
    stage.check(model, ALL)
    stage.check(clone, {"turbo": 1.0})
    clone.set_adapters(["mix", "style"])
    stage.check(clone, {"mix": 1.0, "style": 1.0})
