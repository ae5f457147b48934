from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_lora.routing.inputs import RouterInputs
from moe_lora.routing.routers.base import Router

NAMES = ("removal_expert", "background_expert", "completion_expert")


class Linear(Router):
    def __init__(self, width: int, experts: int = 3, *, scale: float = 1.0, **extra: Any) -> None:
        super().__init__()
        self.head = nn.Linear(width, experts)
        self.scale = scale

    def logits(self, inputs: RouterInputs) -> Tensor:
        return self.scale * self.head(inputs.hidden_states.mean(1))


class PerToken(Linear):
    def logits(self, inputs: RouterInputs) -> Tensor:
        return self.head(inputs.hidden_states)


class NeedsMask(Linear):
    needs_mask = True


class Recorder(Linear):
    def logits(self, inputs: RouterInputs) -> Tensor:
        self.seen = inputs
        return super().logits(inputs)


def call(batch: int = 2, **known: Any) -> RouterInputs:
    return RouterInputs(torch.randn(batch, 5, 8), **known)


@pytest.mark.parametrize("cls", [Linear, PerToken])
@pytest.mark.parametrize(("strategy", "top_k"), [("soft", None), ("hard", None), ("topk", 2)])
def test_weights_and_logits(cls, strategy, top_k):
    router = cls(8).configure(NAMES, strategy=strategy, top_k=top_k)
    weights, logits = router(call())
    assert weights.shape == logits.shape == ((2, 3) if cls is Linear else (2, 5, 3))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    expected = {"soft": 3, "hard": 1, "topk": 2}[strategy]
    assert ((weights != 0).sum(-1) == expected).all()


def test_the_decision_keeps_the_plain_logits():
    router, inputs = Linear(8).configure(NAMES, temperature=0.3), call()
    plain = router(inputs).logits
    hinted = router(RouterInputs(inputs.hidden_states, task_hint="background_focus"))
    assert torch.equal(hinted.logits, plain)
    assert torch.equal(plain, router.logits(inputs))
    assert (hinted.weights[:, 1] > router(inputs).weights[:, 1]).all()


def test_gradient_reaches_every_parameter():
    router = Linear(8).configure(NAMES)
    router(call()).weights[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())


def test_hints_by_position_before_experts_are_named():
    weights = Linear(8)(call(task_hint="expert_2_only")).weights
    assert torch.equal(weights, torch.tensor([[0.0, 0.0, 1.0]] * 2))


def test_an_unknown_hint_raises():
    with pytest.raises(ValueError, match="Expected `task_hint` to be one of"):
        Linear(8).configure(NAMES)(call(task_hint="remove"))


def test_a_missing_mask_raises_and_says_what_to_do():
    with pytest.raises(ValueError, match=r"NeedsMask needs a mask.*set_router_inputs"):
        NeedsMask(8)(call())
    Linear(8)(call())


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (2, 5, 1, 3)])
def test_logits_of_another_shape_raise(shape):
    class Wrong(Linear):
        def logits(self, inputs: RouterInputs) -> Tensor:
            return torch.zeros(shape)

    with pytest.raises(ValueError, match=r"Wrong.logits to return \(batch=2, experts=3\)"):
        Wrong(8).configure(NAMES)(call())


def test_configure_checks_its_settings():
    router = Linear(8)
    with pytest.raises(ValueError, match=r"`top_k` to be in \[1, num_experts=3\], but got 6"):
        router.configure(NAMES, strategy="topk", top_k=6)
    assert router.configure(list(NAMES)) is router
    assert router.expert_names == NAMES


def test_a_subclass_without_logits_cannot_be_built():
    class Empty(Router):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Empty()


def test_init_kwargs_are_the_arguments_given():
    assert Linear(8).init_kwargs == {"width": 8}
    assert Linear(8, 4, scale=2.0).init_kwargs == {"width": 8, "experts": 4, "scale": 2.0}
    given = Linear(width=8, color="red").init_kwargs
    assert given == {"width": 8, "color": "red"}
    assert Linear(**given).init_kwargs == given


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_keep_arguments_settings_and_values(clone):
    router = Linear(8, scale=3.0).configure(NAMES, strategy="topk", temperature=0.5, top_k=2)
    twin, inputs = clone(router), call()
    assert twin.init_kwargs == {"width": 8, "scale": 3.0}
    assert torch.equal(twin(inputs).weights, router(inputs).weights)
    with torch.no_grad():
        twin.head.weight.add_(1.0)
    assert not torch.equal(twin(inputs).weights, router(inputs).weights)


def test_state_dict_round_trip():
    router, inputs = Linear(8), call()
    other = Linear(**router.init_kwargs)
    assert not torch.equal(other(inputs).weights, router(inputs).weights)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other(inputs).weights, router(inputs).weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_does_not_round_the_router(dtype):
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "router": Linear(8)})
    before = copy.deepcopy(model["router"].state_dict())
    model.to(dtype)
    assert model["body"].weight.dtype == dtype
    for name, value in model["router"].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    model.to(torch.float64)
    assert model["router"].head.weight.dtype == torch.float64


def test_half_precision_inputs_arrive_in_float32():
    router = Recorder(8)
    inputs = RouterInputs(
        torch.randn(2, 5, 8, dtype=torch.bfloat16), timestep=torch.ones(2, dtype=torch.bfloat16)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, logits = router(inputs)
    assert router.seen.hidden_states.dtype == torch.float32
    assert router.seen.timestep.dtype == torch.float32
    assert weights.dtype == logits.dtype == torch.float32


def test_a_half_precision_timestep_beside_float32_tokens_arrives_in_float32():
    router = Recorder(8)
    router(call(timestep=torch.ones(2, dtype=torch.bfloat16)))
    assert router.seen.timestep.dtype == torch.float32
