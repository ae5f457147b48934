"""Routers that decide for every layer."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.routing import adapted_layers
from moe_lora.routing.weights.routing import Routing
from moe_lora.tuner.base_layer import RoutedLayer

E = 3


class ByLayer(moe_lora.Router):
    """Router with separate weights per layer, computed in one product."""

    def __init__(self, num_layers, num_experts=E, num_inputs=6):
        super().__init__()
        self.num_layers = num_layers
        self.linear = nn.Linear(num_inputs, num_layers * num_experts)
        self.asked = 0

    def logits(self, inputs):
        self.asked += 1
        mean = inputs.hidden_states.mean(1)
        return 3 * self.linear(mean).unflatten(1, (self.num_layers, -1))


moe_lora.register_router("by_layer")(ByLayer)


class Net(nn.Module):
    """Linear layers and a convolution, on `(B, T, D)` and `(B, D)` inputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.conv = nn.Conv2d(6, 6, 1)
        self.modulate = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6)

    def forward(self, hidden_states):
        h = self.first(hidden_states)
        h = self.conv(h.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
        return self.last(h * self.modulate(hidden_states.mean(1)).unsqueeze(1))


def net(cls=Net):
    torch.manual_seed(0)
    return cls()


X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))


def adapted(**config):
    config = {"router": "by_layer", **config}
    targets = ["first", "conv", "modulate", "last"]
    return get_peft_model(
        net(), MoELoraConfig(r=2, target_modules=targets, init_lora_weights=False, **config)
    )


GATES = {
    "soft": {},
    "hard": {"routing_strategy": "hard"},
    "topk": {"routing_strategy": "topk", "top_k": 2},
}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_every_layer_uses_its_own_weights_and_the_router_is_asked_once(gate):
    model = adapted(**gate)
    router = model.base_model.model.moe_router.moe_lora_routers["default"]
    assert router.num_layers == 4
    assert [path.rpartition(".")[2] for path in adapted_layers(model)] == [
        "first",
        "conv",
        "modulate",
        "last",
    ]
    seen = {}
    layers = [m for m in model.modules() if isinstance(m, RoutedLayer)]
    for index, layer in enumerate(layers):
        layer.register_forward_hook(
            lambda m, args, out, index=index: seen.update({index: (args[0], out)})
        )
    model(hidden_states=X)
    assert router.asked == 1
    weights = moe_lora.current_routing(model).weights
    assert weights.shape == (2, 4, E)
    assert not torch.allclose(weights[:, 0], weights[:, 1])
    for index, layer in enumerate(layers):
        x, out = seen[index]
        again = copy.deepcopy(layer)
        for sample in range(2):
            own = Routing({"default": weights[sample, index]})  # (E,) for the whole input
            with again.context.use(own):
                torch.testing.assert_close(again(x)[sample], out[sample], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gradients_reach_the_router_and_a_batch_equals_its_samples(gate):
    model = adapted(**gate)
    model(hidden_states=X).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "moe_lora_routers" in name:
            by_layer = parameter.grad.view(4, -1).abs().sum(1)
            assert (by_layer > 0).all(), name
    with torch.no_grad():
        whole = model(hidden_states=X)
        for i in range(2):
            one = slice(i, i + 1)
            torch.testing.assert_close(model(hidden_states=X[one]), whole[one])


def test_it_is_saved_with_its_number_of_layers_and_loads_only_where_it_fits(tmp_path):
    model = adapted().eval()
    expected = model(hidden_states=X)
    model.save_pretrained(tmp_path)
    assert model.peft_config["default"].router_kwargs == {"num_layers": 4}
    loaded = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(loaded(hidden_states=X), expected)
    assert torch.equal(copy.deepcopy(loaded)(hidden_states=X), expected)

    class More(Net):
        def __init__(self):
            super().__init__()
            self.more = nn.ModuleDict({"last": nn.Linear(6, 6)})

    with pytest.raises(ValueError, match=r"`num_layers` of ByLayer to be .* 5, but got 4"):
        PeftModel.from_pretrained(net(More), tmp_path)


def test_numbers_that_do_not_fit_raise():
    model = adapted(router=None)
    with pytest.raises(ValueError, match=r"`num_layers` of ByLayer to be .* 4, but got 3"):
        moe_lora.attach_router(model, ByLayer(3))
    router = ByLayer(len(adapted_layers(model)))
    moe_lora.attach_router(model, router)
    model(hidden_states=X)
    router.linear = nn.Linear(6, 3 * E)
    router.logits = lambda inputs: torch.zeros(2, 3, E)
    with pytest.raises(ValueError, match=r"\(batch=2, layers=4, experts=3\), but got \(2, 3, 3\)"):
        model(hidden_states=X)
    with pytest.raises(ValueError, match="`adapter_name` to be one of"):
        adapted_layers(model, "other")
    with pytest.raises(ValueError, match=r"`num_layers` of ByLayer to be .* 4, but got 9"):
        adapted(router_kwargs={"num_layers": 9})


def test_statistics_count_the_mean_over_layers():
    model = adapted()
    model(hidden_states=X)
    weights = moe_lora.current_routing(model).weights
    stats = moe_lora.routing_stats(model)
    assert stats.current_weights == pytest.approx(weights.mean((0, 1)).tolist())
    moe_lora.routing.load_balancing_loss(weights).backward()


def test_it_is_not_merged_or_exported_but_by_weights_of_ones_choice(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="ByLayer computes them from the input"):
        moe_lora.merge(model)
    router = model.base_model.model.moe_router.moe_lora_routers["default"]
    router.fixed_weights = lambda: torch.full((4, E), 1 / E)
    with pytest.raises(ValueError, match=r"fixed_weights to return \(E,\) .* got \(4, 3\)"):
        moe_lora.merge(model)
    with moe_lora.route(model, torch.tensor([0.2, 0.3, 0.5])):
        expected = model(hidden_states=X)
    moe_lora.merge(model, [0.2, 0.3, 0.5])
    torch.testing.assert_close(model(hidden_states=X), expected, rtol=1e-4, atol=1e-5)


def test_checkpointed_and_given_weights_still_act():
    model = adapted()
    with moe_lora.route(model, torch.rand(2, E)):
        given = model(hidden_states=X)
    moe_lora.set_routing_mode(model, "uniform")
    uniform = model(hidden_states=X)
    moe_lora.set_routing_mode(model, "routed")
    routed = model(hidden_states=X)
    assert not torch.allclose(given, routed)
    assert not torch.allclose(uniform, routed)
    run = moe_lora.routing.routed_checkpoint(model)
    grads = []
    for checkpointed in (False, True):
        model.zero_grad()
        layer, seen = model.base_model.model.first, []
        handle = layer.register_forward_hook(lambda m, *_, s=seen: s.append(m.context.current()))
        model(hidden_states=X)
        handle.remove()

        def step(x, layer=layer):
            return layer(x).square().sum()

        with layer.context.use(seen[0]):
            loss = run(step, X, use_reentrant=False) if checkpointed else step(X)
        loss.backward()
        grads.append(layer.moe_lora_experts["default"].lora_B.grad.clone())
    torch.testing.assert_close(*grads)


def test_blocks_compile_as_one_graph_for_all_layers():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(x)

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, hidden_states):
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return hidden_states

    torch.manual_seed(0)
    torch._dynamo.reset()
    config = {"target_modules": ["linear"], "init_lora_weights": False, "router": "by_layer"}
    model = get_peft_model(Stack(), MoELoraConfig(r=2, **config))
    x = X.clone().requires_grad_()  # as the output of every block but the first
    expected = model(hidden_states=x)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.base_model.model.blocks:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(hidden_states=x), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


class TestOffsetsOfTheThreeExpertRouter:
    def model(self, make_flux, **kwargs):
        config = MoELoraConfig(
            r=2,
            target_modules=["to_q", "norm1.linear"],
            router="three_expert_removal",
            router_kwargs=kwargs,
            init_lora_weights=False,
        )
        torch.manual_seed(3)
        return get_peft_model(make_flux(layers=2), config).eval()

    def test_they_start_at_zero_and_then_tell_layers_apart(self, make_flux, make_flux_inputs):
        plain = self.model(make_flux)
        model = self.model(make_flux, num_layers="auto")
        router = model.base_model.model.moe_router.moe_lora_routers["default"]
        layers = adapted_layers(model)
        assert router.layer_offsets.shape == (len(layers), E)
        assert model.peft_config["default"].router_kwargs["num_layers"] == len(layers) == 6
        call = make_flux_inputs()
        plain(**call), model(**call)
        expected = moe_lora.current_routing(plain).weights
        found = moe_lora.current_routing(model).weights
        assert found.shape == (2, 6, E)
        with torch.no_grad():
            router.layer_offsets[1, 2] = 9
        model(**call)[0].square().mean().backward()
        found = moe_lora.current_routing(model).weights
        assert found[:, 1].argmax(-1).tolist() == [2, 2]
        torch.testing.assert_close(found[:, 0], found[:, 3])
        assert (router.layer_offsets.grad.abs().sum(1) > 0).all()
        assert expected.shape == (2, E)
