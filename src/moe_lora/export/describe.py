"""The contents of a checkpoint or a plain LoRA file as plain data."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_lora.checkpoint_reader import DIFFUSERS_NAME, is_checkpoint, weights_file
from moe_lora.export.expert_table import ExpertTable, table_of_checkpoint
from moe_lora.export.formats.lora_file import read_lora_file
from moe_lora.export.lora_factors import Factors
from moe_lora.tuner.state_dict.stored import WEIGHTS_NAME


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a moe_lora checkpoint or a plain LoRA by its files alone.

    Args:
        path: a checkpoint's folder, a plain LoRA's folder, or a safetensors file.

    Returns:
        JSON values. Both kinds have `kind` ("mixture" or "lora"), `path`, `layers` (rank, sizes,
        strength and Frobenius norms of `s · B A` by layer) and `base` (`model`, `class`,
        `in_channels`, `None` where the files do not say). A mixture also has `experts`, `norms` by
        expert over all layers, and `router`; a plain LoRA `layout`, `norm`, and `moe_lora` with
        what `export_lora` wrote into the header.

    Raises:
        FileNotFoundError: when there is nothing, or a checkpoint lacks one of its files.
        TypeError: when a config's `router_kwargs` are not arguments of its router.
        ValueError: when the files are corrupt, hold neither, or do not fit each other.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"Expected a checkpoint or a plain LoRA at {str(path)!r}, but there is none."
        )
    inside = path.name in (WEIGHTS_NAME, DIFFUSERS_NAME) and path.is_file()
    folder = path.parent if inside and weights_file(path.parent) == path else path
    if is_checkpoint(folder):
        table, router = table_of_checkpoint(folder)
        return {"kind": "mixture", "path": str(folder), **_describe_table(table, router)}
    return {"kind": "lora", "path": str(path), **_describe_plain(path)}


def _describe_table(table: ExpertTable, router: dict[str, Tensor]) -> dict[str, Any]:
    config = table.config
    layers: dict[str, Any] = {}
    for path, experts in table.layers.items():
        norms = {
            name: Factors(experts.lora_A[e], experts.lora_B[:, e]).norm() * experts.scaling
            for e, name in enumerate(table.names)
        }
        layers[path] = {
            "rank": experts.lora_A.shape[1],
            "in": list(experts.lora_A.shape[2:]),
            "out": experts.lora_B.shape[0],
            "scaling": experts.scaling,
            "norms": norms,
        }
    described = config.router and {
        "name": config.router,
        "strategy": config.routing_strategy,
        "temperature": config.routing_temperature,
        "top_k": config.top_k,
        "parameters": sum(tensor.numel() for tensor in router.values()),
    }
    return {
        "experts": list(table.names),
        "layers": layers,
        "norms": {n: _total(layer["norms"][n] for layer in layers.values()) for n in table.names},
        "router": described,
        "base": {
            "model": config.base_model_name_or_path,
            "class": table.base_class,
            "in_channels": table.in_channels,
        },
    }


def _describe_plain(path: Path) -> dict[str, Any]:
    plain = read_lora_file(path)
    layers = {
        name: {
            "rank": stored.down.shape[0],
            "in": list(stored.down.shape[1:]),
            "out": stored.up.shape[0],
            "scaling": stored.scaling,
            "norm": stored.factors().norm(),
        }
        for name, stored in plain.layers.items()
    }
    metadata = plain.metadata
    return {
        "layout": plain.layout,
        "layers": layers,
        "norm": _total(layer["norm"] for layer in layers.values()),
        "base": {
            "model": plain.base_model or metadata.get("base_model"),
            "class": metadata.get("base_class"),
            "in_channels": metadata.get("in_channels"),
        },
        "moe_lora": metadata or None,
    }


def _total(norms: Any) -> float:
    return math.sqrt(sum(norm**2 for norm in norms))
