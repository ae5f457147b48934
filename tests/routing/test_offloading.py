"""Routers whose weights are offloaded are asked with their weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

import moe_lora
from moe_lora import MoELoraConfig

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
E = 3


class Direct(moe_lora.Router):
    """Keep parameters and a buffer beside its modules."""

    def __init__(self, num_inputs=128, num_experts=E):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(num_inputs, num_experts))
        self.register_buffer("shift", torch.randn(num_experts))

    def logits(self, inputs):
        return inputs.hidden_states.mean(1) @ self.scale + self.shift


class Lookup(nn.Module):
    def __init__(self, rows, num_experts):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(rows, num_experts))

    def forward(self, x):
        return x @ self.rows


class Nested(moe_lora.Router):
    """Call its modules, and read the weights of modules, called or not."""

    def __init__(self, num_inputs=128, num_experts=E):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(num_inputs, 8), nn.SiLU())
        self.inner = nn.ModuleDict({"table": Lookup(8, num_experts)})
        self.listed = nn.ParameterList([torch.randn(8, num_experts)])
        self.read = nn.Linear(8, num_experts)
        self.tied = nn.Linear(8, 8)

    def logits(self, inputs):
        hidden = self.body(inputs.hidden_states.mean(1))
        hidden = F.linear(self.tied(hidden), self.tied.weight)
        rows = self.inner["table"](hidden) + hidden @ self.listed[0]
        return rows + F.linear(hidden, self.read.weight, self.read.bias)


class Layers(moe_lora.Router):
    """Weigh each layer by a row of its own."""

    def __init__(self, num_layers, num_inputs=128, num_experts=E):
        super().__init__()
        self.num_layers = num_layers
        self.rows = nn.Embedding(num_layers, num_experts)
        self.linear = nn.Linear(num_inputs, num_experts)

    def logits(self, inputs):
        return self.linear(inputs.hidden_states.mean(1))[:, None] + self.rows.weight


ROUTERS = {
    "offloaded_direct": Direct,
    "offloaded_nested": Nested,
    "offloaded_layers": Layers,
}
for name, cls in ROUTERS.items():
    moe_lora.register_router(name)(cls)

KINDS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 2, "low_cpu_mem_usage": True},
    "leaf": {"offload_type": "leaf_level"},
    "low memory": {"offload_type": "leaf_level", "low_cpu_mem_usage": True, "non_blocking": True},
}


@pytest.fixture(params=["three_expert_removal", *ROUTERS])
def adapted(request, make_flux, flux_targets):
    model = make_flux(layers=2)
    torch.manual_seed(5)
    model.add_adapter(
        MoELoraConfig(
            r=2, target_modules=flux_targets, router=request.param, init_lora_weights=False
        )
    )
    return model


def offload(model, kind, folder):
    options = {"onload_device": CPU, "offload_device": CPU, "use_stream": False, **KINDS[kind]}
    model.enable_group_offload(**options, offload_to_disk_path=folder and str(folder))
    return model


def others(inputs):
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    changed["hidden_states"] = changed["hidden_states"].flip(0) * 0.5
    return changed


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_several_passes_equal_those_without(adapted, make_flux_inputs, tmp_path, kind, disk):
    calls = [make_flux_inputs(), others(make_flux_inputs()), make_flux_inputs()]
    plain, model = adapted.eval(), copy.deepcopy(adapted).eval()
    offload(model, kind, tmp_path if disk else None)
    with torch.no_grad():
        for inputs in calls:
            assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
            assert torch.equal(weights(model), weights(plain))


def weights(model):
    return moe_lora.current_routing(model).weights


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_weights_in_memory(adapted, make_flux_inputs, kind):
    plain, model = adapted.train(), offload(copy.deepcopy(adapted).train(), kind, None)
    for seed, inputs in enumerate((make_flux_inputs(), others(make_flux_inputs()))):
        for each in (plain, model):
            torch.manual_seed(seed)  # for dropout in the router
            each(**inputs)[0].square().mean().backward()
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_taken_with_weights_that_are_on_disk(
    adapted, make_flux_inputs, tmp_path, kind
):
    model = offload(adapted.train(), kind, tmp_path)
    loss = model(**make_flux_inputs())[0].square().mean()
    with pytest.raises(RuntimeError, match=r"offloaded to disk.*without `offload_to_disk_path`"):
        loss.backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_model_around_it(make_flux, make_flux_inputs, flux_targets, tmp_path, kind):
    config = MoELoraConfig(
        r=2, target_modules=flux_targets, router="offloaded_nested", init_lora_weights=False
    )
    plain = get_peft_model(make_flux(), config).eval()
    model = copy.deepcopy(plain)
    options = {**KINDS[kind], "onload_device": CPU, "offload_to_disk_path": str(tmp_path)}
    apply_group_offloading(model, **options)
    with torch.no_grad():
        for inputs in (make_flux_inputs(), others(make_flux_inputs())):
            assert torch.equal(model(**inputs)[0], plain(**inputs)[0])


@pytest.mark.parametrize("size", [1, 2])
def test_a_sequential_part_whose_last_group_holds_the_router(tmp_path, size):
    part = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    config = MoELoraConfig(
        target_modules=["0", "1"],
        router="offloaded_direct",
        router_kwargs={"num_inputs": 6},
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, part)
    plain = nn.ModuleDict({"part": part}).eval()
    model = copy.deepcopy(plain)
    apply_group_offloading(
        model, CPU, num_blocks_per_group=size, offload_to_disk_path=str(tmp_path)
    )
    x = torch.rand(2, 4, 6)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model["part"](x), plain["part"](x))


def test_weights_that_accelerate_keeps(adapted, make_flux_inputs):
    plain, model = adapted.eval(), copy.deepcopy(adapted).eval()
    cpu_offload(model, execution_device=CPU)
    with torch.no_grad():
        for inputs in (make_flux_inputs(), others(make_flux_inputs())):
            assert torch.equal(model(**inputs)[0], plain(**inputs)[0])
            assert all(p.is_meta for p in model.moe_router.parameters())


def test_weights_that_nothing_brings_in_are_an_error(adapted, make_flux_inputs):
    model = adapted.eval()
    model.moe_router.to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match=r"Expected the weights of .* in memory"):
        model(**make_flux_inputs())


def test_weights_on_disk_are_not_merged(make_flux, flux_targets, tmp_path):
    model = make_flux()
    model.add_adapter(MoELoraConfig(target_modules=flux_targets, init_lora_weights=False))
    merged = copy.deepcopy(model)
    moe_lora.merge(merged)
    for each, name in ((model, "model"), (merged, "merged")):
        offload(each, "block", tmp_path / name)
    for change in (
        lambda: moe_lora.merge(model),
        lambda: moe_lora.merge(model, torch.tensor([1.0, 0.0, 0.0])),
        lambda: model.fuse_lora(),
        lambda: moe_lora.unmerge(merged),
    ):
        with pytest.raises(ValueError, match="are offloaded to disk"):
            change()
