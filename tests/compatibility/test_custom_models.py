"""What PEFT checks of each of its methods on small models, for mixtures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig


class Layers(nn.Module):
    """A model of blocks, for `layers_to_transform`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.lin0 = nn.Linear(10, 10)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin0(self.conv(x).relu().mean((2, 3))))


class Nested(nn.Module):
    """A model in which a layer has a name that PEFT uses, too."""

    def __init__(self) -> None:
        super().__init__()
        self.default = nn.Linear(10, 10)
        self.block = nn.Sequential(nn.Linear(10, 20, bias=False), nn.ReLU(), nn.Linear(20, 10))
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.default(x)))


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    targets: Any
    kwargs: dict[str, Any] = field(default_factory=dict)

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def config(self, **kwargs: Any) -> MoELoraConfig:
        given = {"r": 4, "target_modules": self.targets, "init_lora_weights": False}
        return MoELoraConfig(**{**given, **self.kwargs, **kwargs})

    def model(self, **kwargs: Any) -> PeftModel:
        return get_peft_model(self.base(), self.config(**kwargs)).eval()

    @property
    def x(self) -> Tensor:
        return torch.rand(self.shape, generator=torch.Generator().manual_seed(1))


FIXED = {"router": "fixed", "router_kwargs": {"weights": [0.2, 0.5, 0.3]}}
CASES = [
    Case("one linear", Layers, (4, 10), ["head"]),
    Case("tokens", Layers, (4, 5, 10), ["layers.0", "head"], FIXED),
    Case("regex", Layers, (4, 10), r".*\.[12]"),
    Case("all linear", Layers, (4, 10), "all-linear", {"num_experts": 2}),
    Case("rank pattern", Layers, (4, 10), ["layers.1", "head"], {"rank_pattern": {"head": 2}}),
    Case("rslora", Layers, (4, 10), ["layers.1"], {"use_rslora": True, "lora_alpha": 3}),
    Case("one expert", Layers, (4, 10), ["layers.1"], {"num_experts": 1}),
    Case("conv", Conv, (4, 3, 8, 6), ["conv"], FIXED),
    Case("conv and linear", Conv, (4, 3, 8, 6), ["conv", "lin0"]),
    Case("names", Nested, (4, 10), ["default", "block.0", "block.2"], FIXED),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def train(model: nn.Module, x: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_only_the_adapter_learns_and_the_output_changes(case):
    model = case.model(init_lora_weights=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = model(case.x)
    close(out, case.base()(case.x))
    train(model, case.x)
    assert not torch.allclose(model(case.x), out)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("moe_lora_experts" in name), name


def test_disabled_and_merged_and_unloaded(case):
    model, base = case.model(), case.base()
    expected = model(case.x)
    with model.disable_adapter():
        close(model(case.x), base(case.x))
    model.merge_adapter(safe_merge=True)
    close(model(case.x), expected)
    with model.disable_adapter():
        close(model(case.x), base(case.x))
    close(model(case.x), expected)
    close(copy.deepcopy(model).merge_and_unload()(case.x), expected)
    close(copy.deepcopy(model).unload()(case.x), base(case.x))


def test_adapters_are_added_merged_and_deleted(case):
    model = case.model()
    alone = model(case.x)
    model.add_adapter("other", case.config(r=2))
    close(model(case.x), alone)
    model.base_model.set_adapter(["default", "other"])
    both = model(case.x)
    model.merge_adapter(["default", "other"])
    close(model(case.x), both)
    model.unmerge_adapter()
    model.delete_adapter("other")
    close(model(case.x), alone)
    model.add_adapter("third", case.config())
    model.delete_adapter("default")
    assert model.active_adapters == ["third"]
    assert not any(".default.lora" in name for name in model.state_dict())
    for module in model.modules():
        assert set(getattr(module, "places", ["third"])) == {"third"}


def test_its_state_dict_and_checkpoint_come_back(case, tmp_path):
    model = case.model(modules_to_save=["head"] if "head" not in case.targets else None)
    if case.targets == "all-linear":
        return
    train(model, case.x)
    expected = model(case.x)
    other = case.model(modules_to_save=model.peft_config["default"].modules_to_save)
    assert not set_peft_model_state_dict(other, get_peft_model_state_dict(model)).unexpected_keys
    close(other(case.x), expected)
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(case.base(), tmp_path)(case.x), expected)


def test_its_status_and_its_repr(case):
    model = case.model()
    layers = get_layer_status(model)
    assert layers
    assert all(layer.module_type.startswith("moe_lora.") for layer in layers)
    assert all(layer.requires_grad == {"default": True} for layer in layers)
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (
        True,
        ["default"],
        [],
    )
    assert status.num_adapter_layers == len(layers)
    assert "moe_lora." in repr(model)
    adapted = [m for m in model.modules() if isinstance(m, moe_lora.MoELoraLinear)]
    for layer in adapted:
        assert (layer.in_features, layer.out_features) == layer.weight.shape[::-1]


def test_every_adapted_layer_has_the_widths_of_its_base(case):
    for module in case.model().modules():
        if hasattr(module, "moe_lora_experts"):
            out, width = module.weight.shape[:2]
            assert (module.in_features, module.out_features) == (width, out)
            assert module.r == {name: e.r for name, e in module.moe_lora_experts.items()}


def test_a_safe_merge_refuses_nan(case):
    model = case.model()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        [p for n, p in model.named_parameters() if n.endswith("lora_B")][-1].view(-1)[0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter(safe_merge=True)
    for name, tensor in model.state_dict().items():
        assert "lora_B" in name or torch.equal(tensor, before[name])


def test_inference_mode_freezes_it(case):
    model = case.model(inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    with torch.inference_mode():
        assert model(case.x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_base_has_float32_experts(case, dtype):
    model = get_peft_model(case.base().to(dtype), case.config()).eval()
    kept = {p.dtype for name, p in model.named_parameters() if "moe_lora_" in name}
    assert kept == {torch.float32}
    out = model(case.x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), case.model()(case.x), rtol=0.1, atol=0.1)
    model.merge_adapter()
    torch.testing.assert_close(model(case.x.to(dtype)), out, rtol=0.1, atol=0.1)


def test_modules_are_excluded_and_layers_chosen():
    case = CASES[0]
    model = case.model(target_modules=["layers.0", "head"], exclude_modules=["head"])
    assert [n for n, m in model.named_modules() if hasattr(m, "moe_lora_experts")] == [
        "base_model.model.layers.0"
    ]
    deep = nn.ModuleDict({"body": nn.Module()})
    deep.body.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(4, 4)}) for _ in range(3))
    chosen = get_peft_model(deep, MoELoraConfig(target_modules=["lin"], layers_to_transform=[1]))
    assert [n for n, m in chosen.named_modules() if hasattr(m, "moe_lora_experts")] == [
        "base_model.model.body.layers.1.lin"
    ]
