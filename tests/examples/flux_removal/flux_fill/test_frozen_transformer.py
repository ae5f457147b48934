from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, get_peft_model
from tiny_models import flux_inputs, tiny_flux, tiny_flux_fill
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe_lora
from flux_fill.base_precision import PACKAGES
from flux_fill.frozen_transformer import economize, load_transformer
from flux_fill.models import load_pipeline
from moe_lora import MoELoraConfig

pytestmark = pytest.mark.slow

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
TARGETS = ["to_q", "norm1.linear", "proj_mlp", "ff.net.2", "proj_out"]
KINDS = {
    "mixture": MoELoraConfig(
        r=2, target_modules=TARGETS, router="three_expert_removal", init_lora_weights=False
    ),
    "plain": LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("flux_fill")
    tiny_flux_fill(transformer=tiny_flux(layers=2)).save_pretrained(folder)
    return folder


def transformer(folder: Path, **options: Any) -> FluxTransformer2DModel:
    pipe = load_pipeline(str(folder), transformer=False)
    load_transformer(pipe, str(folder), **options)
    return pipe.transformer


def adapted(base: FluxTransformer2DModel, kind: str) -> nn.Module:
    torch.manual_seed(3)
    return get_peft_model(base, copy.deepcopy(KINDS[kind])).train()


def gradients(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    torch.manual_seed(0)  # for dropout in the router
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        output = model(**flux_inputs())[0]
    output.float().square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        error = (found[name] - value).norm() / (value.norm() + 1e-8)
        assert error < rtol, (name, float(error))


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.02), ("fp8", 0.08), ("bf16", 0.02)])
def test_linear_layers_are_stored_in_the_precision(
    precision: Any, limit: float, folder: Path
) -> None:
    pytest.importorskip(PACKAGES.get(precision, "torch"))
    base = transformer(folder, base_precision=precision)
    plain = transformer(folder)
    assert not any(p.requires_grad for p in base.parameters())
    for (name, layer), other in zip(base.named_modules(), plain.modules(), strict=True):
        if not isinstance(layer, nn.Linear) or (precision == "bf16" and "blocks" not in name):
            assert {p.dtype for p in layer.parameters(recurse=False)} <= {torch.float32}
            continue
        stored = getattr(layer.weight, "qdata", layer.weight)
        wanted = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
        assert stored.dtype == wanted[precision], name
        weight = layer.weight if stored is layer.weight else layer.weight.dequantize()
        assert 0 < (weight - other.weight).norm() < limit * other.weight.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("precision", "offload"),
    [(None, True), ("int8", False), ("int8", True), ("fp8", False), ("fp8", True)],
)
def test_gradients_are_those_with_kept_weights(
    precision: Any, offload: bool, dtype: torch.dtype | None, kind: str, folder: Path
) -> None:
    pytest.importorskip(PACKAGES.get(precision, "torch"))

    def build() -> nn.Module:
        computation = dtype or torch.float32
        return adapted(transformer(folder, dtype=computation, base_precision=precision), kind)

    expected, rtol = gradients(build(), dtype), 1e-5 if dtype is None else 5e-2
    found = build()
    economize(found.base_model.model, dtype or torch.float32, CPU, offload=offload)
    assert_same(gradients(found, dtype), expected, rtol)
    found.zero_grad()
    found.base_model.model.enable_gradient_checkpointing()
    assert_same(gradients(found, dtype), expected, rtol)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_dequantized_weight_is_kept_for_the_backward_pass(
    kind: str, precision: Any, folder: Path
) -> None:
    pytest.importorskip(PACKAGES.get(precision, "torch"))

    def kept(model: nn.Module) -> set[torch.Size]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, _same):
            model(**flux_inputs())
        return {*shapes, *(shape[::-1] for shape in shapes)}

    model = adapted(transformer(folder, base_precision=precision), kind)
    block = model.base_model.model.single_transformer_blocks[1]
    weight = block.attn.to_k.weight.shape
    assert weight == (32, 32)
    assert weight in kept(model)
    economize(model.base_model.model, torch.float32, CPU, offload=False)
    assert weight not in kept(model)


def _same(tensor: Tensor) -> Tensor:
    return tensor


class OneDevice(TorchDispatchMode):
    """Raise for operations on tensors of several devices, as a GPU does; sum what is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            if args[0].device == CPU and result.device == DEVICE:
                self.copied.append(args[0].numel())
            return result
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
        devices = {tensor.device for tensor in tensors}
        if len(devices) > 1:
            raise RuntimeError(f"Expected one device, but {func} got {devices}.")
        return result


def run_on_device(model: nn.Module) -> OneDevice:
    model.to(DEVICE)
    inputs = {name: value.to(DEVICE) for name, value in flux_inputs().items()}
    with OneDevice() as mode:
        model(**inputs)[0].square().mean().backward()
    return mode


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_device_gets_one_layer_at_a_time_in_both_passes(
    checkpointing: bool, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This device has no autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    model = adapted(transformer(folder), kind)
    base = model.base_model.model
    if kind == "mixture":
        # The router reads values of the mask, which tensors on this device lack.
        moe_lora.set_routing_mode(model, "uniform")
    if checkpointing:
        base.enable_gradient_checkpointing()
    economize(base, torch.float32, DEVICE, offload=True)
    blocks = [*base.transformer_blocks, *base.single_transformer_blocks]
    layers = [
        layer
        for block in blocks
        for layer in block.modules()
        if type(layer) is nn.Linear and not isinstance(layer.weight, nn.Parameter)
    ]
    mode = run_on_device(model)
    assert {layer.weight.device for layer in layers} == {CPU}
    assert {p.device for p in model.parameters()} == {DEVICE}
    assert base.device == DEVICE
    weights = sum(layer.weight.numel() for layer in layers)
    biases = sum(layer.bias.numel() for layer in layers)
    assert weights > 0.5 * sum(p.numel() for p in tiny_flux(layers=2).parameters())
    passes = 3 if checkpointing else 2
    assert sum(mode.copied) <= passes * weights + (passes - 1) * biases
    assert max(mode.copied) == max(layer.weight.numel() for layer in layers)
    trained = [p for n, p in model.named_parameters() if p.requires_grad and "router" not in n]
    assert all(p.grad is not None and p.grad.device == DEVICE for p in trained)


def test_weights_left_on_the_cpu_would_raise_on_a_device(folder: Path) -> None:
    model = adapted(transformer(folder), "plain")
    economize(model.base_model.model, torch.float32, DEVICE, offload=True)
    for layer in model.modules():
        vars(layer).pop("forward", None)
    with pytest.raises(RuntimeError, match="not on the expected device meta"):
        run_on_device(model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_with_its_own_layers(kind: str, folder: Path) -> None:
    model = adapted(transformer(folder), kind).eval()
    economize(model.base_model.model, torch.float32, CPU, offload=True)
    twin = copy.deepcopy(model)
    expected = model(**flux_inputs())[0]
    for layer in model.modules():
        if type(layer) is nn.Linear and not isinstance(layer.weight, nn.Parameter):
            layer.weight.zero_()
    assert torch.equal(twin(**flux_inputs())[0], expected)
    assert not torch.equal(model(**flux_inputs())[0], expected)


def test_group_offloading_of_diffusers_takes_weights_from_the_backward_pass(folder: Path) -> None:
    # Why training keeps weights away by itself; `remove.py` has no backward pass.
    base = transformer(folder)
    base.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    model = adapted(base, "plain")
    for module in base.modules():
        hook = getattr(module, "_diffusers_hook", None)
        offloading = hook and hook.get_hook("group_offloading")
        if offloading:
            destroy_while_away(offloading.group)
    output = model(**flux_inputs())[0]
    assert bool(output.isfinite().all())
    output.square().mean().backward()
    trained = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(gradient is not None and bool(gradient.isnan().any()) for gradient in trained)


def destroy_while_away(group: Any) -> None:
    """Fill the weights of a group with NaN whenever it is offloaded."""
    parameters = [p for module in group.modules for p in module.parameters()]
    parameters += group.parameters
    kept: dict[Tensor, Tensor] = {}

    def offload() -> None:
        for parameter in parameters:
            if parameter not in kept:
                kept[parameter] = parameter.data
                parameter.data = torch.full_like(parameter, torch.nan)

    def onload() -> None:
        for parameter in list(kept):
            parameter.data = kept.pop(parameter)

    group.offload_, group.onload_ = offload, onload
    offload()
