"""What `torch.compile` makes of an adapted block: no graph break, no needless recompilation."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import moe_lora
from moe_lora import MoELoraConfig

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.second(self.first(x).tanh())


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        return x + self.second(self.first(x).tanh())


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states):
        return self.block(hidden_states)


class ByMean(moe_lora.Router):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def logits(self, inputs):
        return self.linear(inputs.hidden_states.mean(1))


SHAPES = {Block: (6, 8), ConvBlock: (8, 4, 3)}
GATES = {
    "soft": {"routing_strategy": "soft"},
    "hard": {"routing_strategy": "hard"},
    "topk": {"routing_strategy": "topk", "top_k": 2},
}


def adapted(block, **config):
    torch.manual_seed(0)
    model = get_peft_model(
        Net(block()),
        MoELoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False, **config),
    )
    moe_lora.attach_router(model, ByMean())
    return model


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


# The gate is the router's, so that one of them is enough for the other kind of layer.
@pytest.mark.parametrize(
    ("block", "gate"), [(Block, "soft"), (Block, "hard"), (Block, "topk"), (ConvBlock, "topk")]
)
def test_an_adapted_block_is_one_graph_for_all_weights_and_batch_sizes(block, gate):
    model = adapted(block, **GATES[gate])
    inputs = [torch.randn(batch, *SHAPES[block]) for batch in (2, 3, 2, 3)]
    expected = [step(model, x) for x in inputs]
    counter = CompileCounterWithBackend("aot_eager")
    model.base_model.model.block.compile(backend=counter, fullgraph=True)
    graphs = []
    for x, wanted in zip(inputs, expected, strict=True):
        x = x.clone()
        torch._dynamo.mark_dynamic(x, 0)
        for found, value in zip(step(model, x), wanted, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 1]
    assert not torch.equal(expected[0][0], expected[2][0])


def step(model, x):
    """Return output, routing weights and all gradients."""
    model.zero_grad()
    out = model(hidden_states=x)
    out.square().mean().backward()
    weights = moe_lora.current_routing(model).weights.detach()
    return [out.detach(), weights, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    "weights", [torch.rand(3), torch.rand(1, 3), torch.rand(2, 3), torch.rand(2, 6, 3), None]
)
def test_a_whole_model_is_one_graph_under_given_and_uniform_weights(weights):
    model = adapted(Block)
    x = torch.randn(2, 6, 8)

    def run(called):
        if weights is None:
            moe_lora.set_routing_mode(model, "uniform")
            return called(hidden_states=x)
        with moe_lora.route(model, weights):
            return called(hidden_states=x)

    expected = run(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.base_model.model, backend=counter, fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(run(compiled), expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["transformer_blocks", "single_transformer_blocks"])
def test_blocks_of_flux_compile_one_by_one(make_flux, make_flux_inputs, flux_targets, kind):
    model = make_flux(layers=2).eval()
    model.add_adapter(
        MoELoraConfig(
            r=4,
            target_modules=flux_targets,
            router="three_expert_removal",
            init_lora_weights=False,
        )
    )
    expected = model(**make_flux_inputs())[0]
    for block in getattr(model, kind):
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model(**make_flux_inputs())[0], expected, rtol=1e-4, atol=1e-5)


def test_inductor_computes_and_learns_the_same():
    model, x = adapted(Block), torch.randn(2, 6, 8)
    expected = step(model, x)
    model.base_model.model.block.compile(fullgraph=True)
    for found, value in zip(step(model, x), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_leaves_nothing_of_its_pass_behind():
    model = adapted(Block)
    inner = model.base_model.model
    compiled = torch.compile(inner, backend="eager")
    compiled(hidden_states=torch.randn(2, 6, 8))
    assert moe_lora.current_routing(model) is not None
    with pytest.raises(RuntimeError, match="outside of a call"):
        inner.block(torch.randn(2, 6, 8))
    with moe_lora.route(model, torch.rand(2, 3)):
        compiled(hidden_states=torch.randn(2, 6, 8))
    assert moe_lora.current_routing(model) is None
