"""Base layers with quantized weights: backends for merging, saving and restoring weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn


class UnmergeableBackend(QuantizationBackend):
    """Backend of a quantization without access to the base weights.

    Layers with this backend can be adapted and trained, but not merged.

    Args:
        backend_name: the name of the quantization in PEFT's layer status.
        weight: the quantized weight, for the error message.
    """

    supports_merge = False
    layer_type = "linear"

    def __init__(self, backend_name: str, weight: Tensor) -> None:
        self.backend_name = backend_name
        self.weight_type = type(weight).__name__

    def get_base_weight(self, base_layer: nn.Module) -> Tensor:
        raise TypeError(
            "Expected a base weight that can be dequantized and quantized again, but got a "
            f"{self.weight_type}. Load the base model without quantization to merge adapters."
        )

    def set_base_weight(self, peft_layer: nn.Module, weight_data: Tensor) -> None:
        self.get_base_weight(peft_layer)


class SavedWeight(NamedTuple):
    """Saved weight of a quantized layer.

    Attributes:
        weight: the weight.
        state: the layer's attribute `state`, the quantization state of bitsandbytes' 8-bit layers;
            `None` for others.
    """

    weight: Tensor
    state: Any


def is_quantized(base: nn.Module) -> bool:
    """Return whether a layer's weight is quantized: not a floating-point tensor of PyTorch's own.

    Args:
        base: a layer with a `weight`.

    Example:
        >>> is_quantized(nn.Linear(2, 2))
        False
    """
    weight = base.weight
    assert isinstance(weight, Tensor)
    return not weight.is_floating_point() or not type(weight).__module__.startswith("torch.")


def quantization_backend(
    base: nn.Module, kwargs: Mapping[str, Any] | None = None
) -> QuantizationBackend | None:
    """Return the backend that dequantizes and quantizes a layer's weight.

    Args:
        base: the base layer.
        kwargs: the model's `peft.utils.get_quantization_kwargs`; required to quantize torchao
            weights again, other than int8 weight-only ones.

    Returns:
        A PEFT backend; `None` for a layer that is not quantized.
    """
    if not is_quantized(base):
        return None
    weight, kwargs = base.weight, dict(kwargs or {})
    assert isinstance(weight, Tensor)
    library = type(weight).__module__.partition(".")[0]
    if library == "torchao":
        config = _int8_weight_only_config(weight)
        if config is not None:
            kwargs["get_apply_tensor_subclass"] = lambda: config
        elif "get_apply_tensor_subclass" not in kwargs:
            return UnmergeableBackend(library, weight)
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        # bitsandbytes repacks 4-bit weights for inference on a CPU; dequantizing these gives wrong
        # values. `state_dict` restores the usual packing.
        base.state_dict()
    backend = resolve_quantization_backend(base, **kwargs)
    return backend if backend is not None else UnmergeableBackend(library, weight)


def save_weight(base: nn.Module) -> SavedWeight:
    """Return a quantized layer's weight, unaffected by later changes of the layer.

    Args:
        base: the quantized layer.
    """
    weight = base.weight
    assert isinstance(weight, Tensor)
    if type(weight).__name__ == "Params4bit":
        # Quantizing a new weight changes attributes of the old one, too.
        weight = copy.copy(weight)
    return SavedWeight(weight, copy.copy(getattr(base, "state", None)))


def restore_weight(base: nn.Module, saved: SavedWeight) -> None:
    """Restore a saved weight exactly.

    Args:
        base: the layer of the weight, on any device.
        saved: the result of `save_weight`.
    """
    assert isinstance(base.weight, Tensor)
    weight = saved.weight
    if weight.device != base.weight.device:
        weight = weight.to(base.weight.device)
    base.weight = weight
    if saved.state is not None:
        base.state = saved.state


def _int8_weight_only_config(weight: Any) -> object | None:
    if type(weight).__name__ != "Int8Tensor" or weight.act_quant_kwargs is not None:
        return None
    torchao = import_module("torchao.quantization")
    columns = weight.block_size[1]
    if list(weight.block_size) == list(weight.shape):
        granularity = torchao.PerTensor()
    elif columns == weight.shape[1]:
        granularity = torchao.PerRow()
    else:
        granularity = torchao.PerGroup(columns)
    config: object = torchao.Int8WeightOnlyConfig(
        granularity=granularity, set_inductor_config=False
    )
    return config
