"""Switches and what they meet: strengths while merged, frozen routers, containers, devices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.functional import set_adapter
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig


@moe_lora.register_router("half frozen")
class HalfFrozen(moe_lora.Router):
    """A router of which its author froze a part."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)
        self.features.requires_grad_(False)

    def logits(self, inputs: moe_lora.RouterInputs) -> Tensor:
        x = inputs.hidden_states
        return self.head(self.features(x.flatten(1, -2).mean(1) if x.ndim > 2 else x))


def config(**kwargs) -> MoELoraConfig:
    given = {"r": 2, "target_modules": ["first", "second"], "init_lora_weights": False}
    return MoELoraConfig(**{**given, **kwargs})


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def trained_router(model: nn.Module) -> set[str]:
    return {
        name.rpartition("moe_lora_routers.")[2]
        for name, p in model.named_parameters()
        if "moe_router" in name and p.requires_grad
    }


HEAD = {"default.head.weight", "default.head.bias"}


class TestFrozenRouters:
    def test_what_a_router_froze_stays_frozen_through_every_switch(self, make_mlp, tmp_path):
        model = get_peft_model(make_mlp(), config(router="half frozen"))
        tuner = model.base_model
        assert trained_router(model) == HEAD
        model.add_adapter("other", config())
        model.set_adapter("other")
        assert not trained_router(model)
        for switch in (
            lambda: model.set_adapter("default"),
            lambda: (tuner.disable_adapter_layers(), tuner.enable_adapter_layers()),
            lambda: (
                model.set_requires_grad("default", requires_grad=False),
                model.set_requires_grad("default"),
            ),
            lambda: model.delete_adapter("other"),
            lambda: inject_adapter_in_model(
                LoraConfig(target_modules=["first"]), model.get_base_model(), "style"
            ),
        ):
            switch()
            assert trained_router(model) == HEAD
        assert trained_router(copy.deepcopy(model)) == HEAD
        copied = pickle.loads(pickle.dumps(model))
        copied.set_adapter("default")
        assert trained_router(copied) == HEAD
        model.save_pretrained(tmp_path)
        for kwargs in ({}, {"low_cpu_mem_usage": True}):
            loaded = PeftModel.from_pretrained(make_mlp(), tmp_path, is_trainable=True, **kwargs)
            assert trained_router(loaded) == HEAD
        frozen = PeftModel.from_pretrained(make_mlp(), tmp_path)
        assert not trained_router(frozen)
        frozen.set_adapter("default")
        assert trained_router(frozen) == HEAD

    def test_an_attached_router_keeps_what_is_frozen_in_it(self, make_mlp):
        model = get_peft_model(make_mlp(), config())
        router = HalfFrozen()
        moe_lora.attach_router(model, router)
        assert trained_router(model) == HEAD
        model.base_model.disable_adapter_layers()
        other = get_peft_model(make_mlp(), config())
        moe_lora.attach_router(other, router)
        assert trained_router(other) == HEAD


class TestStrengthsAndMerging:
    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.set_scale("default", 0.1),
            lambda layer: layer.scale_layer(3.0),
            lambda layer: layer.unscale_layer(0.5),
            lambda layer: layer.moe_lora_experts["default"].lora_A.data.mul_(2),
            lambda layer: layer.moe_lora_experts["default"].reset_parameters(),
        ],
    )
    def test_what_was_merged_is_taken_out_again(self, make_mlp, change):
        model, base = get_peft_model(make_mlp(), config()), make_mlp()
        x = torch.rand(2, 6)
        model.merge_adapter()
        for layer in (model.base_model.model.first, model.base_model.model.second):
            change(layer)
        model = copy.deepcopy(model)
        with model.disable_adapter():
            close(model(x), base(x))
        model.merge_adapter()
        model.unmerge_adapter()
        close(model.base_model.model.first.get_base_layer().weight, base.first.weight)

    def test_scales_are_taken_back_exactly(self, make_mlp):
        model = get_peft_model(make_mlp(), config())
        layer = model.base_model.model.first
        experts = layer.moe_lora_experts["default"]
        layer.set_scale("default", 0.3)
        before = experts.scaling
        for scale in (0.7, 0.0, 3.3):
            layer.scale_layer(scale)
            assert experts.scaling == before * scale
            layer.unscale_layer(scale)
            assert experts.scaling == before
        layer.scale_layer(0.5)
        layer.scale_layer(0.1)
        layer.unscale_layer(0.1)
        layer.unscale_layer(0.5)
        assert experts.scaling == before
        layer.unscale_layer(0.5)
        assert experts.scaling == before * 2
        with pytest.raises(ValueError, match="but got 0"):
            layer.unscale_layer(0)
        layer.unscale_layer()
        assert experts.scaling == experts.base_scaling

    def test_an_inactive_adapter_may_have_other_experts(self, make_mlp):
        model = get_peft_model(make_mlp(), config())
        model.add_adapter("two", config(num_experts=2))
        x, weights = torch.rand(2, 6), [0.2, 0.3, 0.5]
        reference = get_peft_model(make_mlp(), config())
        reference.load_state_dict(model.state_dict(), strict=False)
        with moe_lora.route(reference, torch.tensor(weights)):
            expected = reference(x)
        moe_lora.merge(model, weights)
        close(model(x), expected)
        moe_lora.unmerge(model)
        with pytest.raises(ValueError, match="E=2 for adapter 'two'"):
            moe_lora.merge(model, weights, adapter_names=["default", "two"])
        assert not model.base_model.model.first.merged


class TestFiles:
    @pytest.mark.parametrize("lora_first", [True, False])
    def test_a_mixture_is_saved_and_loaded_beside_a_lora(self, make_mlp, tmp_path, lora_first):
        lora = LoraConfig(target_modules=["first", "head"], init_lora_weights=False)
        model, x = make_mlp(), torch.rand(2, 6)
        for step in (lora, config()) if lora_first else (config(), lora):
            name = "mix" if isinstance(step, MoELoraConfig) else "style"
            inject_adapter_in_model(step, model, name)
        set_adapter(model, ["mix"])
        expected = model(x)
        moe_lora.save_adapter(model, tmp_path, "mix")
        plain = make_mlp()
        moe_lora.load_adapter(plain, tmp_path, "mix")
        close(plain(x), expected)
        beside = make_mlp()
        inject_adapter_in_model(lora, beside, "style")
        moe_lora.load_adapter(beside, tmp_path, "mix")
        set_adapter(beside, ["mix"])
        close(beside(x), expected)
        assert moe_lora.routing.adapted_layers(beside, "mix") == ("first", "second")
        outside = get_peft_model(beside, config(), "second")
        outside.load_adapter(tmp_path, "third")
        set_adapter(beside, ["third"])
        close(beside(x), expected)


class TestContainers:
    @pytest.mark.parametrize(
        "call",
        [
            lambda m: moe_lora.set_routing_mode(m, "uniform"),
            lambda m: moe_lora.set_router_inputs(m, mask=torch.ones(1, 1, 4, 4)),
            lambda m: moe_lora.merge(m, [0.2, 0.3, 0.5]),
            lambda m: moe_lora.unmerge(m),
            lambda m: moe_lora.routing_stats(m),
            lambda m: moe_lora.current_routing(m),
            lambda m: moe_lora.routing.adapted_layers(m),
            lambda m: moe_lora.attach_router(m, HalfFrozen()),
            lambda m: moe_lora.save_adapter(m, "nowhere"),
            lambda m: moe_lora.save_experts(m, "nowhere"),
            lambda m: moe_lora.export_lora(m, "nowhere.safetensors", weights=[0.2, 0.3, 0.5]),
            lambda m: moe_lora.route(m, torch.tensor([0.2, 0.3, 0.5])).__enter__(),
        ],
    )
    @pytest.mark.parametrize("kind", [nn.ModuleDict, lambda d: nn.ModuleList(d.values())])
    def test_two_adapted_parts_are_refused(self, make_mlp, call, kind):
        parts = {"a": get_peft_model(make_mlp(), config()), "b": make_mlp()}
        inject_adapter_in_model(config(), parts["b"])
        both = kind(parts)
        before = copy.deepcopy(both.state_dict())
        with pytest.raises(ValueError, match=r"Expected one adapted model, but .* has 2"):
            call(both)
        after = both.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    def test_one_part_among_others_is_found(self, make_mlp):
        parts = nn.ModuleDict({"a": make_mlp(), "b": get_peft_model(make_mlp(), config())})
        twice = nn.ModuleDict({"a": parts, "b": parts["b"]})
        moe_lora.merge(twice, [0.2, 0.3, 0.5])
        assert parts["b"].base_model.model.first.merged


class TestDevicesAndFormats:
    def test_convolutions_in_channels_last(self):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        model = get_peft_model(base, config(target_modules=["0", "2"]))
        x = torch.rand(2, 3, 6, 5)
        expected = model(x)
        expected.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        model = model.to(memory_format=torch.channels_last)
        found = model(x.to(memory_format=torch.channels_last))
        assert found.is_contiguous(memory_format=torch.channels_last)
        close(found, expected)
        found.square().sum().backward()
        for parameter, grad in zip(
            (p for p in model.parameters() if p.requires_grad), grads, strict=True
        ):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)
        model.merge_adapter()
        close(model(x), expected)

    def test_built_on_meta_made_empty_and_loaded(self, make_mlp):
        model = get_peft_model(make_mlp(), config(router="half frozen"))
        x = torch.rand(2, 6)
        expected = model(x)
        with torch.device("meta"):
            empty = get_peft_model(make_mlp(), config(router="half frozen"))
        empty = empty.to_empty(device="cpu")
        empty.load_state_dict(model.state_dict())
        close(empty(x), expected)
        assert trained_router(empty) == HEAD

    @pytest.mark.parametrize("router", [None, "half frozen"])
    def test_nothing_goes_to_the_default_device(self, make_mlp, router):
        base, x = make_mlp(), torch.rand(2, 6)
        torch.set_default_device("meta")
        try:
            model = get_peft_model(base, config(router=router))
            model(x).square().sum().backward()
            assert sum(moe_lora.routing_stats(model).usage) == (0 if router is None else 2)
            moe_lora.merge(model, [0.2, 0.3, 0.5])
            model(x)
        finally:
            torch.set_default_device(None)
        assert not any(p.is_meta for p in model.parameters())
        assert all(p.grad is not None for n, p in model.named_parameters() if "experts" in n)


class TestCopiedBlocks:
    def test_a_copied_block_still_belongs_to_its_model(self, make_mlp):
        model = get_peft_model(make_mlp(), config(router="half frozen"))
        inner = model.base_model.model
        inner.first, inner.second = copy.deepcopy(inner.first), copy.deepcopy(inner.second)
        set_adapter(inner, [])
        assert not trained_router(model)
        set_adapter(inner, ["default"])
        assert trained_router(model) == HEAD
        model.base_model.disable_adapter_layers()
        assert inner.moe_router.disable_adapters

    def test_layers_keep_no_model_alive(self, make_mlp):
        import gc
        import weakref

        gc.disable()
        try:
            model = make_mlp()
            inject_adapter_in_model(config(router="half frozen"), model)
            gone = weakref.ref(model)
            layer = model.first
            del model
            assert gone() is None
            layer.set_adapter([])
        finally:
            gc.enable()
