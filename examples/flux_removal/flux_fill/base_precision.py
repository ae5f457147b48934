"""How the weights of a frozen transformer are stored, and what that needs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

BasePrecision = Literal["bf16", "fp8", "int8", "nf4"]

PACKAGES = {"fp8": "torchao", "int8": "torchao", "nf4": "bitsandbytes"}
"""The package that stores weights in a precision, where PyTorch does not."""


def check_base_precision(precision: BasePrecision | None) -> None:
    """Raise when packages or hardware for a precision are missing; nothing is loaded for it.

    Args:
        precision: of the frozen weights; `None` for that of the computation.

    Raises:
        ValueError: when the package is not installed, or nf4 has no GPU.
    """
    package = PACKAGES.get(precision or "")
    if package is not None and find_spec(package) is None:
        raise ValueError(
            f"Expected the package {package} with `base_precision` {precision}, but it is not "
            "installed. Install it with `pip install moe-lora[quantized]`."
        )
    if precision == "nf4" and not gpu_is_available():
        raise ValueError(
            "Expected a GPU with `base_precision` nf4, but found none: diffusers quantizes to nf4 "
            "on GPUs only. Pass int8 or fp8 instead."
        )


def gpu_is_available() -> bool:
    """Return whether there is a device on which diffusers quantizes with bitsandbytes."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def quantization_config(precision: BasePrecision | None, dtype: torch.dtype) -> Any:
    """Return the configuration that diffusers loads a transformer with.

    Args:
        precision: of the weights of linear layers.
        dtype: of the computation.

    Returns:
        A configuration of diffusers; `None` for weights that are not quantized.
    """
    if precision in (None, "bf16"):
        return None
    diffusers: Any = import_module("diffusers")
    if precision == "nf4":
        return diffusers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    torchao: Any = import_module("torchao.quantization")
    weights = {"fp8": torchao.Float8WeightOnlyConfig, "int8": torchao.Int8WeightOnlyConfig}
    return diffusers.TorchAoConfig(weights[precision](set_inductor_config=False))
