"""Single experts to plain LoRA files, and back into a mixture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from torch import nn

from moe_lora.config import MoELoraConfig
from moe_lora.experts import MoELoraExperts
from moe_lora.export.factors import Factors
from moe_lora.export.fitting import read_lora_for
from moe_lora.export.layouts import anchored, exact_targets, header, peft_tensors
from moe_lora.export.plain import StoredFactors
from moe_lora.export.sources import CONFIG_NAME, adapted_layers, some, table_of_model
from moe_lora.files import replacing, write_tensors
from moe_lora.routed_layer import RoutedLayer
from moe_lora.routing.control import routed_module
from moe_lora.stored import WEIGHTS_NAME


def save_experts(
    model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default"
) -> list[Path]:
    """Write every expert as a plain PEFT LoRA, which stock PEFT loads onto the base model.

    An expert alone is what the mixture gives at one-hot weights. The files are
    `directory/<expert_name>/adapter_config.json` and `adapter_model.safetensors`; each folder is
    written under a temporary name and renamed when it is whole.

    Args:
        model: the adapted model, or a wrapper around it.
        directory: where the expert folders go; created when missing.
        adapter_name: whose experts.

    Returns:
        The folders, in the order of the experts.

    Raises:
        ValueError: when the model or the adapter does not exist, or when the adapter trains whole
            modules, too, without which an expert is not what it was.
    """
    table = table_of_model(model, adapter_name)
    table.check_plain()
    held = dict(adapted_layers(routed_module(model), adapter_name))
    lora_config = _plain_config(table.config, held)
    folders = []
    for index, name in enumerate(table.names):
        lora = {
            path: Factors(experts.lora_A[index], experts.lora_B[:, index])
            for path, experts in table.layers.items()
        }
        noted = header(expert=name, base_class=table.base_class, in_channels=table.in_channels)
        folder = Path(directory) / name
        with replacing(folder) as temporary:
            write_tensors(temporary / WEIGHTS_NAME, peft_tensors(lora), noted)
            lora_config.save_pretrained(str(temporary))
        folders.append(folder)
    return folders


def load_experts(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    names: Sequence[str] | None = None,
    *,
    adapter_name: str = "default",
    skip: Sequence[str] = (),
) -> list[str]:
    """Load experts into a mixture that exists, each into the place that its name has there.

    All files are read and checked before a weight changes; on an error the model is as it was.

    Args:
        model: the adapted model, or a wrapper around it.
        source: a folder with one folder per expert, as `save_experts` writes it, or the path of a
            plain LoRA (of any layout) for every expert's name.
        names: which experts; all that `source` has by default.
        adapter_name: into whose mixture.
        skip: beginnings of keys to leave out of the files, such as those of a text encoder.

    Returns:
        The names of the experts that were loaded.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for an expert that the mixture does not have, for a file that cannot be read,
            or whose layers, ranks or sizes are not those of the mixture; or when the experts are
            merged into the base weights.
    """
    table, base = table_of_model(model, adapter_name), routed_module(model)
    paths = _paths(source, names)
    foreign = [name for name in paths if name not in table.names]
    if foreign or not paths:
        raise ValueError(
            f"Expected experts out of {list(table.names)}, but got "
            f"{some(foreign) if foreign else 'none'}. Choose with `names`."
        )
    if any(isinstance(m, RoutedLayer) and m.merged for m in base.modules()):
        raise ValueError(
            "Expected experts apart from the base weights, but they are merged. Call "
            "moe_lora.unmerge(model) first."
        )
    layers = dict(adapted_layers(base, adapter_name))
    loaded = {name: read_lora_for(base, path, skip) for name, path in paths.items()}
    for name, stored in loaded.items():
        _check_fits(name, stored, layers)
    for name, stored in loaded.items():
        for path, factors in stored.items():
            _put(layers[path], table.names.index(name), factors)
    return list(loaded)


def _paths(
    source: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    names: Sequence[str] | None,
) -> dict[str, Path]:
    if isinstance(source, Mapping):
        found = {name: Path(path) for name, path in source.items()}
    else:
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(f"Expected a folder at {str(folder)!r}, but there is none.")
        found = {
            entry.name: entry
            for entry in sorted(folder.iterdir())
            if (entry / CONFIG_NAME).is_file()
        }
    if names is None:
        return found
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"Expected `names` out of {sorted(found)}, but got {some(missing)}.")
    return {name: found[name] for name in names}


def _check_fits(
    name: str, stored: Mapping[str, StoredFactors], layers: Mapping[str, MoELoraExperts]
) -> None:
    extra, missing = sorted(stored.keys() - layers.keys()), sorted(layers.keys() - stored.keys())
    if extra or missing:
        raise ValueError(
            f"Expected expert {name!r} to adapt the {len(layers)} layers of the mixture, but it "
            + (f"lacks {some(missing)}" if missing else f"also adapts {some(extra)}")
            + ". moe_lora.from_loras builds a mixture around differing files."
        )
    for path, factors in stored.items():
        if factors.down.shape[0] != layers[path].r:
            raise ValueError(
                f"Expected expert {name!r} to have rank {layers[path].r} in {path!r}, but got "
                f"{factors.down.shape[0]}."
            )


@torch.no_grad()
def _put(experts: MoELoraExperts, index: int, stored: StoredFactors) -> None:
    # At the scaling that it was saved with, an expert returns bit by bit.
    up = stored.up
    if stored.scale != experts.base_scaling:
        up = up * (stored.scale / experts.base_scaling)
    experts.lora_A[index].copy_(stored.down)
    experts.lora_B[:, index].copy_(up)


def _plain_config(config: MoELoraConfig, layers: dict[str, MoELoraExperts]) -> LoraConfig:
    ranks = {path: e.r for path, e in layers.items() if e.r != config.r}
    alphas = {path: e.lora_alpha for path, e in layers.items() if e.lora_alpha != config.lora_alpha}
    return LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=exact_targets(layers),
        rank_pattern={anchored(path): rank for path, rank in ranks.items()},
        alpha_pattern={anchored(path): alpha for path, alpha in alphas.items()},
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
