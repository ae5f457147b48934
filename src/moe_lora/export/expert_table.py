"""Read the experts of an adapter off a model, or off a checkpoint without any model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from moe_lora.adapter_tensors import check_in_memory
from moe_lora.config import PEFT_TYPE, MoELoraConfig
from moe_lora.experts import MoELoraExperts
from moe_lora.export.lora_factors import ExpertTable, LayerExperts
from moe_lora.module_paths import bare_modules
from moe_lora.routed_layer import RoutedLayer
from moe_lora.routing.control import routed_module
from moe_lora.safetensors_io import read_tensors, widened
from moe_lora.stored import WEIGHTS_NAME, input_width

CONFIG_NAME = "adapter_config.json"

_EXPERTS_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.moe_lora_experts\.(lora_[AB])$")


def adapted_layers(base: nn.Module, adapter_name: str) -> Iterator[tuple[str, MoELoraExperts]]:
    """Yield the path in the bare model and the experts of every layer that an adapter has.

    Args:
        base: the module that the adapter was injected into.
        adapter_name: whose layers.
    """
    for _, bare, module in bare_modules(base):
        held = getattr(module, "moe_lora_experts", None)
        if isinstance(module, RoutedLayer) and held is not None and adapter_name in held:
            experts = held[adapter_name]
            assert isinstance(experts, MoELoraExperts)
            yield bare, experts


def table_of_model(model: nn.Module, adapter_name: str = "default") -> ExpertTable:
    """Read the experts of an adapter off a model; the tensors are the model's own, detached.

    Args:
        model: the adapted model, or a wrapper around it.
        adapter_name: whose experts.

    Raises:
        ValueError: when the model or the adapter does not exist, or when weights are offloaded or
            spread over processes.
    """
    base = routed_module(model)
    held = dict(adapted_layers(base, adapter_name))
    if not held:
        raise ValueError(f"Expected an adapter named {adapter_name!r}, but the model has none.")
    check_in_memory(
        model, {f"{path}.{n}": p for path, e in held.items() for n, p in e.named_parameters()}
    )
    layers = {
        path: LayerExperts(e.lora_A.detach(), e.lora_B.detach(), e.scaling)
        for path, e in held.items()
    }
    configs = base.peft_config
    assert isinstance(configs, dict)
    return ExpertTable(
        configs[adapter_name],
        layers,
        base_class=type(base).__name__,
        in_channels=input_width(base),
    )


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder holds a moe_lora checkpoint (rather than a plain LoRA)."""
    file = Path(folder) / CONFIG_NAME
    return file.is_file() and read_json(file).get("peft_type") == PEFT_TYPE.value


def table_of_checkpoint(folder: str | os.PathLike[str]) -> tuple[ExpertTable, dict[str, Tensor]]:
    """Read the experts off a checkpoint as `save_pretrained` writes it, without a base model.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The experts, and the router's tensors by name.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is corrupt, or they do not agree.
    """
    folder = Path(folder)
    entries = read_json(folder / CONFIG_NAME)
    if entries.get("peft_type") != PEFT_TYPE.value:
        raise ValueError(
            f"Expected a moe_lora checkpoint at {str(folder)!r}, but its {CONFIG_NAME} is of a "
            f"{entries.get('peft_type')!r} adapter."
        )
    try:
        config = MoELoraConfig.from_pretrained(str(folder))
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"Expected the config of a mixture in {str(folder / CONFIG_NAME)!r}, but a field has a "
            f"value that no config has ({error})."
        ) from error
    tensors, _ = read_tensors(folder / WEIGHTS_NAME)
    pairs: dict[str, dict[str, Tensor]] = {}
    router: dict[str, Tensor] = {}
    for key, stored in tensors.items():
        tensor = widened(stored)
        if match := _EXPERTS_KEY.match(key):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif ".moe_lora_routers." in key:
            router[key.partition(".moe_lora_routers.")[2]] = tensor
    if config.stored is not None:
        config.stored.check_config()
    if not pairs:
        raise ValueError(
            f"Expected the experts of a mixture in {str(folder / WEIGHTS_NAME)!r}, but none of its "
            f"{len(tensors)} keys ends in `moe_lora_experts.lora_A`."
        )
    layers = {path: _layer(path, pair, config) for path, pair in pairs.items()}
    base_class = (entries.get("auto_mapping") or {}).get("base_model_class")
    # Checkpoints of 0.1.0 tell the width only by the layer that the model's input meets first.
    width = config.base_in_channels or _width_of(layers)
    return ExpertTable(config, layers, base_class, width), router


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file at {str(path)!r}, but there is none.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Expected JSON in {str(path)!r}, but it is truncated or corrupt ({error})."
        ) from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"Expected a JSON object in {str(path)!r}, but got a {type(entries).__name__}."
        )
    return entries


def some(names: list[str], count: int = 5) -> str:
    """Name the first few of a list, and say how many more there are.

    Example:
        >>> some(["a", "b", "c"], 2)
        "'a', 'b' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


def _layer(path: str, pair: dict[str, Tensor], config: MoELoraConfig) -> LayerExperts:
    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), config.r)
    alpha = config.alpha_pattern.get(
        get_pattern_key(list(config.alpha_pattern), path), config.lora_alpha
    )
    missing = [name for name in ("lora_A", "lora_B") if name not in pair]
    if missing:
        raise ValueError(f"Expected lora_A and lora_B of {path!r}, but got no {missing[0]}.")
    lora_A, lora_B, count = pair["lora_A"], pair["lora_B"], len(config.experts)
    a_shape, b_shape = tuple(lora_A.shape), tuple(lora_B.shape)
    if len(a_shape) not in (3, 5) or a_shape[:2] != (count, r) or b_shape[1:] != (count, r):
        raise ValueError(
            f"Expected the experts of {path!r} to be (E={count}, r={r}, in) and (out, {count}, "
            f"{r}) as the config says, but got {a_shape} and {b_shape}."
        )
    return LayerExperts(lora_A, lora_B, alpha / (r**0.5 if config.use_rslora else r))


def _width_of(layers: dict[str, LayerExperts]) -> int | None:
    # The layers that a model's input meets first, of transformers and of UNets.
    for path in ("x_embedder", "conv_in"):
        if path in layers:
            return layers[path].lora_A.shape[2]
    return None
