from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moe_lora
from moe_lora import MoELoraConfig, Router, RouterInputs
from moe_lora.schedules import set_routing_temperature, set_trainable
from moe_lora.schedules.model_settings import _FROZEN


class Head(Router):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def logits(self, inputs: RouterInputs) -> Tensor:
        return self.head(inputs.hidden_states.mean(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.last(self.linear(hidden_states))


def adapted(**config) -> nn.Module:
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["linear"], "init_lora_weights": False} | config
    model = get_peft_model(Net(), MoELoraConfig(**settings))
    moe_lora.attach_router(model, Head())
    return model


def with_gradient(model: nn.Module) -> set[str]:
    kinds = {"router": "moe_router", "experts": "moe_lora_experts", "whole": "modules_to_save"}
    return {
        kind
        for name, parameter in model.named_parameters()
        for kind, part in kinds.items()
        if part in name and parameter.grad is not None
    }


def backward(model: nn.Module) -> None:
    model(torch.randn(4, 3, 6)).square().mean().backward()


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("all", {"router", "experts", "whole"}),
        ("experts", {"experts", "whole"}),
        ("router", {"router"}),
    ],
)
def test_only_what_is_trained_keeps_a_gradient(train, trained):
    model = adapted(modules_to_save=["last"])
    asked = {name for name, p in model.named_parameters() if p.requires_grad}
    set_trainable(model, train)
    for _ in range(2):  # gradients accumulate
        backward(model)
        assert with_gradient(model) == trained
    assert {name for name, p in model.named_parameters() if p.requires_grad} == asked


def test_parts_thaw_and_a_repeated_call_changes_nothing():
    model = adapted()
    for train in ("router", "router", "experts", "all", "all"):
        set_trainable(model, train)
        model.zero_grad()
        backward(model)
        assert with_gradient(model) == ({"router", "experts"} if train == "all" else {train})


def test_gradients_of_the_rest_are_those_without_freezing():
    found = []
    for train in ("all", "experts"):
        model = adapted()
        set_trainable(model, train)
        torch.manual_seed(1)
        backward(model)
        experts = model.get_base_model().linear.moe_lora_experts["default"]
        found.append((experts.lora_A.grad, experts.lora_B.grad))
    for plain, frozen in zip(*found, strict=True):
        assert torch.equal(plain, frozen)


def test_a_frozen_part_forgets_the_gradients_of_before():
    model = adapted()
    backward(model)
    model.zero_grad(set_to_none=False)
    set_trainable(model, "experts")
    assert with_gradient(model) == {"experts"}


def test_an_optimizer_leaves_a_frozen_part_alone():
    model = adapted()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5
    )
    backward(model)
    optimizer.step()
    set_trainable(model, "experts")
    router = next(m for m in model.modules() if isinstance(m, Router)).head.weight
    before, moments = router.clone(), copy.deepcopy(optimizer.state[router])
    for _ in range(3):
        backward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert torch.equal(router, before)
    assert all(torch.equal(moments[key], optimizer.state[router][key]) for key in moments)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_nothing_frozen_and_leaves_the_original_alone(clone):
    model = adapted()
    set_trainable(model, "router")
    twin = clone(model)
    backward(twin)
    assert with_gradient(twin) == {"router", "experts"}
    set_trainable(twin, "all")
    backward(model)
    assert with_gradient(model) == {"router"}


def test_a_model_that_is_gone_is_forgotten():
    gc.collect()
    before = len(_FROZEN)
    model = adapted()
    set_trainable(model, "router")
    assert len(_FROZEN) == before + 2
    del model
    gc.collect()
    assert len(_FROZEN) == before


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("first", ["all", "router"])
def test_parts_freeze_and_thaw_under_ddp(views, first):
    course = [first, "router", "router", "experts", "all", "router"]
    plain, shared = adapted(), adapted()
    set_trainable(shared, first)
    wrapped = DistributedDataParallel(shared, gradient_as_bucket_view=views)
    for model, called in ((plain, plain), (shared, wrapped)):
        torch.manual_seed(2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for train in course:
            set_trainable(called, train)
            backward(called)
            assert with_gradient(model) == ({"router", "experts"} if train == "all" else {train})
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(plain.named_parameters(), shared.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.usefixtures("one_process")
def test_under_fsdp2_freezing_raises():
    model = adapted()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    set_trainable(model, "all")
    with pytest.raises(ValueError, match="under FSDP2"):
        set_trainable(model, "router")


def test_the_temperature_acts_and_is_noted():
    model, x = adapted(), torch.randn(4, 3, 6)
    set_routing_temperature(nn.Sequential(model), 0.1)
    model(x)
    decision = moe_lora.current_routing(model)
    torch.testing.assert_close(decision.weights, (decision.logits / 0.1).softmax(-1))
    assert model.peft_config["default"].routing_temperature == 0.1


def test_every_adapter_with_a_router_gets_the_temperature():
    model = adapted()
    model.add_adapter("other", MoELoraConfig(r=1, target_modules=["linear"], router="uniform"))
    model.add_adapter("third", MoELoraConfig(r=1, target_modules=["linear"]))
    set_routing_temperature(model, 3.0)
    found = [config.routing_temperature for config in model.peft_config.values()]
    assert found == [3.0, 3.0, 1.0]


def test_what_cannot_be_honored_raises():
    model = adapted()
    with pytest.raises(ValueError, match="`routing_temperature` to be > 0"):
        set_routing_temperature(model, 0.0)
    with pytest.raises(ValueError, match="`train` to be one of"):
        set_trainable(model, "base")
    with pytest.raises(ValueError, match="moe_lora adapter"):
        set_trainable(Net(), "all")
    bare = get_peft_model(Net(), MoELoraConfig(target_modules=["linear"]))
    for steer in (
        lambda: set_routing_temperature(bare, 2.0),
        lambda: set_trainable(bare, "router"),
    ):
        with pytest.raises(ValueError, match="Expected a router"):
            steer()
