from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig
from moe_lora.tuner.quantization import is_quantized, quantization_backend

torchao = pytest.importorskip("torchao.quantization")

WIDTH = 64
WEIGHTS = [0.6, 0.3, 0.1]

# The error that a weight-only quantization may add to an output when a change is merged into it.
MERGE_ERROR = {"int8": 0.02, "bnb-8bit": 0.02, "bnb-nf4": 0.2}
CASES = [
    pytest.param((kind, device), id=f"{kind}-{device}", marks=[pytest.mark.gpu] * (device != "cpu"))
    for kind in MERGE_ERROR
    for device in ("cpu", "cuda")
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def bnb_linear(linear: nn.Linear, kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
    bias = linear.bias is not None
    if kind == "bnb-8bit":
        made = bnb.nn.Linear8bitLt(*sizes.values(), bias=bias, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(
            *sizes.values(), bias=bias, quant_type="nf4", compute_dtype=torch.float32
        )
    made.load_state_dict(linear.state_dict())
    return made


def quantized_net(kind: str, device: str) -> Net:
    torch.manual_seed(0)
    net = Net().requires_grad_(False)
    if kind == "int8":
        torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    else:
        net.first, net.second = bnb_linear(net.first, kind), bnb_linear(net.second, kind)
    return net.to(device)


def adapted(net: nn.Module, **kwargs: Any) -> PeftModel:
    torch.manual_seed(1)
    config = MoELoraConfig(
        **{"r": 4, "target_modules": ["first", "second"], "init_lora_weights": False, **kwargs}
    )
    return get_peft_model(net, config)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def kind(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture
def make(case: tuple[str, str]) -> Callable[[], Net]:
    return lambda: quantized_net(*case)


@pytest.fixture
def x(case: tuple[str, str]) -> Tensor:
    if case[1] == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.randn(2, 5, WIDTH, device=case[1])


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def raw(weight: Tensor) -> Tensor:
    return weight.qdata if hasattr(weight, "qdata") else weight.data


def test_the_output_is_that_of_the_quantized_base_plus_the_mixture(make, x):
    net, weights = make(), torch.rand(2, 3, device=x.device)
    expected = net.first(x).detach().clone()
    model = adapted(net)
    layer = model.base_model.model.first
    experts = layer.moe_lora_experts["default"]
    for b in range(2):
        for e in range(3):
            change = experts.lora_B[:, e] @ experts.lora_A[e]
            expected[b] += (weights[b, e] * experts.scaling * (x[b] @ change.T)).detach()
    with moe_lora.route(model, weights):
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_step_trains_every_expert_and_leaves_the_base_alone(make, x):
    model = adapted(make())
    base = model.base_model.model.first.base_layer.weight
    before = raw(base).clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first_loss = model(x).square().mean()
    first_loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert (parameter.grad.abs().sum((1, 2)) > 0).all(), name
        elif "lora_B" in name:
            assert (parameter.grad.abs().sum((0, 2)) > 0).all(), name
        else:
            assert parameter.grad is None, name
    optimizer.step()
    assert model(x).square().mean() < first_loss
    assert torch.equal(raw(base), before)


def test_a_saved_adapter_loads_onto_another_quantized_base(make, x, tmp_path):
    model = adapted(make()).eval()
    with torch.no_grad():
        expected = model(x)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make(), tmp_path).eval()
        assert torch.equal(loaded(x), expected)


def test_merging_quantizes_the_changed_weight_and_unmerging_restores_every_bit(make, x, kind):
    model = adapted(make()).eval()
    weight = model.base_model.model.first.base_layer.weight
    before = raw(weight).clone()
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        with moe_lora.route(model, torch.tensor(WEIGHTS)):
            expected = model(x)
        moe_lora.merge(model, WEIGHTS, safe_merge=True)
        merged = model.base_model.model.first.base_layer.weight
        assert type(merged) is type(weight)
        assert not torch.equal(raw(merged), before)
        assert relative_error(base, expected) > 0.5
        assert relative_error(model(x), expected) < MERGE_ERROR[kind]
        moe_lora.unmerge(model)
        assert torch.equal(raw(model.base_model.model.first.base_layer.weight), before)
        with model.disable_adapter():
            assert torch.equal(model(x), base)
        moe_lora.merge(model, WEIGHTS)
        assert relative_error(model(x), expected) < MERGE_ERROR[kind]


def test_two_adapters_are_merged_and_quantized_once(make, x):
    model = adapted(make()).eval()
    model.add_adapter(
        "second",
        MoELoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False),
    )
    layer = model.base_model.model.first
    backend = quantization_backend(layer.base_layer)
    weight = backend.get_base_weight(layer.base_layer).float()
    change = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    twin = adapted(make()).base_model.model.first
    backend.set_base_weight(twin, weight + change)
    model.merge_adapter(["default", "second"])
    differing = raw(layer.base_layer.weight) != raw(twin.base_layer.weight)
    assert differing.float().mean() < 0.01  # quantizing twice changes more than half of them
    model.unmerge_adapter()
    assert torch.equal(backend.get_base_weight(layer.base_layer).float(), weight)


def test_a_merge_that_gives_nan_changes_nothing(make, x):
    model = adapted(make()).eval()
    layer = model.base_model.model.first
    before = raw(layer.base_layer.weight).clone()
    with torch.no_grad():
        layer.moe_lora_experts["default"].lora_A[1, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="produces NaN"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(raw(layer.base_layer.weight), before)
    assert not layer.merged


def test_merge_and_unload_leaves_a_quantized_model_without_adapters(make, x, kind):
    model = adapted(make()).eval()
    with torch.no_grad():
        expected = model(x)
        merged = model.merge_and_unload()
        assert relative_error(merged(x), expected) < MERGE_ERROR[kind]
    assert is_quantized(merged.first)
    assert merged.state_dict().keys() == make().state_dict().keys()


def test_unload_gives_the_base_model_back(make, x):
    with torch.no_grad():
        expected = make().eval()(x)
        assert torch.equal(adapted(make()).eval().unload()(x), expected)


def test_a_copy_merges_by_itself(make, x):
    model = adapted(make()).eval()
    with torch.no_grad():
        expected = model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), expected)
        twin.merge_adapter()
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
        twin.unmerge_adapter()
        assert torch.equal(twin(x), expected)


def test_peft_reports_the_quantization(make, x, kind):
    names = {"int8": "torchao", "bnb-8bit": "bnb 8bit", "bnb-nf4": "bnb 4bit"}
    status = {s.name: s.quantization_backend for s in adapted(make()).get_layer_status()}
    assert status["model.first"] == status["model.second"] == names[kind]


@pytest.mark.parametrize(
    "granularity", [torchao.PerRow(), torchao.PerTensor(), torchao.PerGroup(16)], ids=str
)
def test_int8_weights_are_quantized_again_as_they_were(granularity):
    config = torchao.Int8WeightOnlyConfig(granularity=granularity)
    net = Net()
    torchao.quantize_(net, config)
    layer = adapted(net).base_model.model.first
    weight, block = layer.base_layer.weight.dequantize(), layer.base_layer.weight.block_size
    expected = nn.Linear(WIDTH, WIDTH)
    expected.weight = nn.Parameter(weight + layer.get_delta_weight("default"), requires_grad=False)
    torchao.quantize_(expected, config)
    layer.merge()
    assert list(layer.base_layer.weight.block_size) == list(block)
    assert torch.equal(layer.base_layer.weight.qdata, expected.weight.qdata)


class PackedLinear(nn.Linear):
    """Two 4-bit numbers a byte, as a quantization that no library here knows might have them."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        packed = torch.randint(0, 256, (WIDTH * WIDTH // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.weight & 15, self.weight >> 4
        unpacked = torch.cat([low, high], dim=1).view(WIDTH, WIDTH)
        return nn.functional.linear(x, (unpacked.float() - 8) / 8, self.bias)


def test_an_unknown_quantization_trains_and_refuses_to_merge():
    net = Net()
    net.first = PackedLinear()
    expected = net(torch.ones(1, WIDTH))
    model = adapted(net)
    layer = model.base_model.model.first
    before = layer.base_layer.weight.clone()
    model(torch.ones(1, WIDTH)).sum().backward()
    assert (layer.moe_lora_experts["default"].lora_A.grad.abs().sum((1, 2)) > 0).all()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"dequantized and quantized again, but got a Para"):
            merge()
    assert torch.equal(layer.base_layer.weight, before)
    torch.testing.assert_close(model.unload()(torch.ones(1, WIDTH)), expected)


def test_torchao_weights_that_hide_their_config_refuse_to_merge():
    net = Net()
    torchao.quantize_(net, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(TypeError, match="but got a Int8Tensor"):
        adapted(net).merge_adapter()


@pytest.mark.parametrize(
    "config",
    [torchao.Int8WeightOnlyConfig(), torchao.Int8DynamicActivationInt8WeightConfig()],
    ids=lambda config: type(config).__name__,
)
def test_a_flux_that_diffusers_quantized(
    config, make_flux, make_flux_inputs, flux_targets, tmp_path: Path
):
    from diffusers import FluxTransformer2DModel, TorchAoConfig

    make_flux().save_pretrained(tmp_path)

    def load() -> nn.Module:
        return FluxTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=TorchAoConfig(config), dtype=torch.float32
        ).eval()

    model, inputs = load(), make_flux_inputs()
    model.add_adapter(
        MoELoraConfig(
            r=2,
            target_modules=flux_targets,
            router="three_expert_removal",
            init_lora_weights=False,
        )
    )
    assert is_quantized(model.x_embedder.base_layer)
    before = model(**inputs)[0]
    before.square().mean().backward()
    trained = [p for name, p in model.named_parameters() if "lora_" in name and p.requires_grad]
    assert len(trained) > 0
    if isinstance(config, torchao.Int8WeightOnlyConfig):  # the other passes on no gradient
        assert all(p.grad is not None and p.grad.any() for p in trained)
    with torch.no_grad():
        with moe_lora.route(model, torch.tensor(WEIGHTS)):
            expected = model(**inputs)[0]
        moe_lora.merge(model, WEIGHTS)
        assert relative_error(model(**inputs)[0], expected) < 0.05
        moe_lora.unmerge(model)
        assert torch.equal(model(**inputs)[0], before)
