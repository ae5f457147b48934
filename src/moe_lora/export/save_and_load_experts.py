"""Save each expert as a plain LoRA, and load plain LoRAs as experts of a mixture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME
from torch import nn

from moe_lora.export.expert_table import (
    ExpertTable,
    experts_by_layer,
    table_of_checkpoint,
    table_of_model,
)
from moe_lora.export.formats.lora_file import StoredFactors
from moe_lora.export.formats.match_layers import read_lora_for
from moe_lora.export.formats.metadata import header
from moe_lora.export.formats.peft import anchored, exact_targets, peft_tensors
from moe_lora.export.listing import first_few
from moe_lora.export.lora_factors import Factors
from moe_lora.routing.lookup import routed_module
from moe_lora.safetensors_io import updating, widened, write_tensors
from moe_lora.tuner.base_layer import RoutedLayer
from moe_lora.tuner.experts import MoELoraExperts
from moe_lora.tuner.state_dict.adapter_tensors import check_finite
from moe_lora.tuner.state_dict.stored import WEIGHTS_NAME
from moe_lora.tuner.validation.names import check_expert_names


def save_experts(
    model: nn.Module | str | os.PathLike[str],
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
) -> list[Path]:
    """Write every expert as a plain PEFT LoRA, which stock PEFT loads onto the base model.

    An expert alone is what the mixture gives at one-hot weights, at the strength that it has now
    (diffusers' `set_adapters(names, strengths)`, PEFT's `set_scale`). The files are
    `directory/<expert_name>/adapter_config.json` and `adapter_model.safetensors`, written under
    temporary names and renamed when they are whole; other files in these folders stay.

    Args:
        model: the adapted model, or a wrapper around it; or the folder of a checkpoint, which is
            read without a base model, for example after training with FSDP2 or DeepSpeed.
        directory: where the expert folders go; created when missing.
        adapter_name: whose experts; of a model only, since a checkpoint has one adapter.

    Returns:
        The folders, in the order of the experts.

    Raises:
        FileNotFoundError: when a file of the checkpoint is missing.
        ValueError: when the model or the adapter does not exist; when its weights are not in
            memory, or hold NaN or inf; or when the adapter trains whole modules, too, without which
            an expert is not what it was.
    """
    if isinstance(model, nn.Module):
        table = table_of_model(model, adapter_name)
        layers = experts_by_layer(routed_module(model), adapter_name)
        check_finite(
            {f"{path}.{n}": p for path, e in layers.items() for n, p in e.named_parameters()}
        )
        alphas = {path: _acting_alpha(experts) for path, experts in layers.items()}
    else:
        table, _ = table_of_checkpoint(model)
        alphas = {path: table.config.alpha_of(path) for path in table.layers}
    table.check_plain()
    check_expert_names(table.names)  # they become folders, and a config may be changed
    lora_config = _plain_config(table, alphas)
    folders = []
    for index, name in enumerate(table.names):
        lora = {
            path: Factors(experts.lora_A[index], experts.lora_B[:, index])
            for path, experts in table.layers.items()
        }
        metadata = header(expert=name, base_class=table.base_class, in_channels=table.in_channels)
        folder = Path(directory) / name
        with updating(folder, last=CONFIG_NAME) as temporary:
            write_tensors(temporary / WEIGHTS_NAME, peft_tensors(lora), metadata)
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
    """Load experts into an existing mixture, each in the place of its name.

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
            f"{first_few(foreign) if foreign else 'none'}. Choose with `names`."
        )
    if any(isinstance(m, RoutedLayer) and m.merged for m in base.modules()):
        raise ValueError(
            "Expected experts apart from the base weights, but they are merged. Call "
            "moe_lora.unmerge(model) first."
        )
    layers = experts_by_layer(base, adapter_name)
    loaded = {name: read_lora_for(base, path, skip) for name, path in paths.items()}
    for name, stored in loaded.items():
        _check_fits(name, stored, layers)
    for name, stored in loaded.items():
        for path, factors in stored.items():
            _copy_expert(layers[path], table.names.index(name), factors)
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
        raise ValueError(f"Expected `names` out of {sorted(found)}, but got {first_few(missing)}.")
    return {name: found[name] for name in names}


def _check_fits(
    name: str, stored: Mapping[str, StoredFactors], layers: Mapping[str, MoELoraExperts]
) -> None:
    extra, missing = sorted(stored.keys() - layers.keys()), sorted(layers.keys() - stored.keys())
    if extra or missing:
        raise ValueError(
            f"Expected expert {name!r} to adapt the {len(layers)} layers of the mixture, but it "
            + (f"lacks {first_few(missing)}" if missing else f"also adapts {first_few(extra)}")
            + ". moe_lora.from_loras builds a mixture around differing files."
        )
    for path, factors in stored.items():
        if factors.down.shape[0] != layers[path].r:
            raise ValueError(
                f"Expected expert {name!r} to have rank {layers[path].r} in {path!r}, but got "
                f"{factors.down.shape[0]}."
            )


@torch.no_grad()
def _copy_expert(experts: MoELoraExperts, index: int, stored: StoredFactors) -> None:
    # At the scaling that it was saved with, an expert returns bit by bit.
    up = widened(stored.up)
    if stored.scaling != experts.base_scaling:
        up = up * (stored.scaling / experts.base_scaling)
    lora_A, lora_B = experts.expert(index)
    lora_A.copy_(stored.down)
    lora_B.copy_(up)


def _plain_config(table: ExpertTable, alphas: dict[str, float]) -> LoraConfig:
    config, usual = table.config, Counter(alphas.values()).most_common(1)[0][0]
    ranks = {path: experts.lora_A.shape[1] for path, experts in table.layers.items()}
    return LoraConfig(
        r=config.r,
        lora_alpha=usual,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=exact_targets(ranks),
        rank_pattern={anchored(path): r for path, r in ranks.items() if r != config.r},
        alpha_pattern={anchored(path): alpha for path, alpha in alphas.items() if alpha != usual},
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )


def _acting_alpha(experts: MoELoraExperts) -> float:
    """Return the `lora_alpha` of a plain LoRA that is as strong as the experts are now."""
    if experts.scaling == experts.base_scaling:
        return experts.lora_alpha
    return experts.lora_alpha * (experts.scaling / experts.base_scaling)
