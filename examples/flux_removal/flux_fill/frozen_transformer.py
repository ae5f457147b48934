"""The frozen transformer: loaded in a precision, with its weights on the device or away from it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxFillPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from flux_fill.base_precision import BasePrecision, quantization_config

PLAIN = (Tensor, nn.Parameter)


def load_transformer(
    pipe: FluxFillPipeline,
    flux_fill_id: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    base_precision: BasePrecision | None = None,
) -> None:
    """Load the transformer into the pipeline, frozen.

    Loaded after the prompts are encoded, it never shares the device with the text encoders.

    Args:
        pipe: the pipeline, with its other parts loaded.
        flux_fill_id: a folder or a hub id.
        dtype: of the computation.
        device: where to.
        base_precision: storage of the weights; that of the computation by default.
    """
    quantization, device = quantization_config(base_precision, dtype), torch.device(device)
    # diffusers quantizes on the device of the map, and nothing that a map sends to the CPU.
    on_device = quantization is not None and device.type != "cpu"
    transformer = FluxTransformer2DModel.from_pretrained(
        flux_fill_id,
        subfolder="transformer",
        dtype=torch.bfloat16 if base_precision == "bf16" else dtype,
        quantization_config=quantization,
        device_map={"": device} if on_device else None,
    ).requires_grad_(False)
    if base_precision == "bf16":
        of_blocks = {id(p) for layer in linear_layers(transformer) for p in layer.parameters()}
        for parameter in transformer.parameters():
            if id(parameter) not in of_blocks:
                parameter.data = parameter.data.to(dtype)
    pipe.register_modules(transformer=transformer if on_device else transformer.to(device))


def linear_layers(transformer: FluxTransformer2DModel) -> list[nn.Linear]:
    """Return the frozen linear layers of the blocks, where nearly all weights are."""
    return [
        layer
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        for layer in block.modules()
        if type(layer) is nn.Linear and not layer.weight.requires_grad
    ]


def economize(
    transformer: FluxTransformer2DModel,
    dtype: torch.dtype,
    device: torch.device,
    *,
    offload: bool,
) -> None:
    """Let linear layers compute with weights in another dtype or place, and keep no copy of them.

    A layer otherwise keeps its dequantized or copied weight from the forward pass to the backward
    pass. Here it makes the weight anew, one layer at a time. Layers of bitsandbytes, which do so
    themselves, stay as they are.

    Args:
        transformer: with its adapter.
        dtype: of the computation.
        device: of the computation.
        offload: keep all frozen weights of the blocks in CPU memory. They are no parameters
            afterwards, so that nothing moves, synchronizes or saves them.
    """
    for layer in linear_layers(transformer):
        if offload:
            move_away(layer, pin=device.type == "cuda")
        if offload or type(layer.weight) not in PLAIN or layer.weight.dtype != dtype:
            vars(layer)["forward"] = FrozenForward(layer)


def move_away(layer: nn.Linear, *, pin: bool) -> None:
    """Turn the parameters of a layer into plain tensors in CPU memory, pinned on demand."""
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        if value is not None:
            delattr(layer, name)
            value = value.detach().to("cpu")
            setattr(layer, name, value.pin_memory() if pin and type(value) in PLAIN else value)


class FrozenForward:
    """Be the forward pass of a frozen linear layer that keeps no weight for the backward pass.

    Args:
        layer: the layer, whose weight may be quantized, and on another device than its input.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        product: Tensor = FrozenProduct.apply(x, self.layer)  # type: ignore[no-untyped-call]  # untyped in torch
        return product


class FrozenProduct(torch.autograd.Function):
    """Compute `y = x W^T + b`, and `dL/dx = dL/dy W` with a weight that is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else usable(layer.bias, x)
        return F.linear(x, usable(layer.weight, x), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ usable(ctx.layer.weight, gradient)).to(ctx.dtype), None


def usable(value: Tensor, x: Tensor) -> Tensor:
    """Return a frozen weight or bias, dequantized, on the device and in the dtype of a product."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    value = value.to(x.device, non_blocking=True)
    return (value if type(value) in PLAIN else value.dequantize()).to(dtype)
