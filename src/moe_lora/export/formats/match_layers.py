"""Find the layers of a model that a plain LoRA file speaks of."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from moe_lora.export.formats.flux_names import flux_norm, flux_paths, split_flux
from moe_lora.export.formats.lora_file import PlainFile, StoredFactors, read_plain
from moe_lora.export.formats.unet_names import diffusers_name
from moe_lora.export.listing import first_few
from moe_lora.export.lora_factors import Factors
from moe_lora.tuner.state_dict.module_paths import bare_modules
from moe_lora.tuner.state_dict.stored import input_width


def read_lora_for(
    model: nn.Module, path: str | os.PathLike[str], skip: Sequence[str] = ()
) -> dict[str, StoredFactors]:
    """Read a plain LoRA, by the paths of the model's layers.

    Args:
        model: the base model, with or without adapters.
        path: a safetensors file or a folder; keys of PEFT, diffusers, kohya or a model's original
            code.
        skip: beginnings of keys to leave out, such as those of a text encoder.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: when it cannot be read, is more than a plain LoRA, names layers that the model
            does not have or one of them twice, or has other sizes than they have.
    """
    plain, layers = read_plain(path, skip), _layers(model)
    flat = _flat_names(layers)
    widths = {name: shape[0] for name, shape in layers.items()}
    found: dict[str, StoredFactors] = {}
    unknown = []
    depth = getattr(getattr(model, "config", None), "layers_per_block", None)
    sgm = partial(diffusers_name, layers_per_block=depth if isinstance(depth, int) else 2)
    for name, stored in plain.layers.items():
        # Tools write the names of the original code with dots, or with underscores only.
        plain_name = name.replace(".", "_")
        target = name if name in layers else flat.get(plain_name, flat.get(sgm(plain_name) or ""))
        parts = flux_paths(plain_name)
        if target is not None:
            split = {target: stored}
        elif parts and all(part in layers for part in parts):
            factors = split_flux(plain_name, Factors(stored.down, stored.up), widths)
            split = {part: StoredFactors(*f, stored.scale) for part, f in factors.items()}
        else:
            unknown.append(name)
            continue
        twice = sorted(split.keys() & found.keys())
        if twice:
            raise ValueError(
                f"Expected one LoRA for every layer in {str(plain.path)!r}, but {twice[0]!r} has "
                "several, in different layouts. Leave one kind out with `skip`."
            )
        found |= split
    if unknown:
        raise ValueError(
            f"Expected {str(plain.path)!r} to speak of layers of the {type(model).__name__} only, "
            f"but it has no {first_few(unknown)}. Leave keys that do not matter here out with "
            "`skip`."
        )
    _check_norms(plain, model)
    return {
        name: _fitted(name, stored, layers[name], plain, model) for name, stored in found.items()
    }


def _flat_names(layers: Iterable[str]) -> dict[str, str]:
    """Return layers by their names without dots, where these are of one layer only."""
    named: dict[str, list[str]] = {}
    for name in layers:
        named.setdefault(name.replace(".", "_"), []).append(name)
    return {flat: names[0] for flat, names in named.items() if len(names) == 1}


def _check_norms(plain: PlainFile, model: nn.Module) -> None:
    weights = {path: getattr(m, "weight", None) for path, m in _base_layers(model).items()}
    for key, scale in plain.norms.items():
        path = flux_norm(key)
        weight = weights.get(path)
        if isinstance(weight, Tensor) and not weight.is_meta and weight.shape == scale.shape:
            coarse = min(weight.dtype, scale.dtype, key=lambda dtype: dtype.itemsize)
            if torch.equal(weight.detach().cpu().to(coarse), scale.to(coarse)):
                continue
        raise ValueError(
            f"Expected a plain LoRA in {str(plain.path)!r}, but it also replaces the norm "
            f"{path!r}, which an expert cannot. Merge it into the base model instead."
        )


def _layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the weight's shape of every layer that can have a LoRA."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, base in _base_layers(model).items():
        if not isinstance(base, nn.Linear | nn.Conv2d):
            continue
        if isinstance(base, nn.Linear):
            # A quantized weight may have another shape.
            shapes[name] = (base.out_features, base.in_features)
        else:
            shapes[name] = (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    return shapes


def _base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the bare model, each in its innermost form."""
    return {bare: module for _, bare, module in bare_modules(model)}


def _fitted(
    name: str,
    stored: StoredFactors,
    shape: tuple[int, ...],
    plain: PlainFile,
    model: nn.Module,
) -> StoredFactors:
    down = stored.down
    if shape[2:] in ((), (1, 1)) and down.shape[2:] in ((), (1, 1)):
        # Some tools write a linear layer as a 1 x 1 convolution, or the other way round.
        down = down.reshape(*down.shape[:2], *shape[2:])
    got = (stored.up.shape[0], *down.shape[1:])
    if got == shape:
        return stored._replace(down=down)
    made_for = plain.metadata.get("in_channels")
    width = input_width(model)
    hint = ""
    if made_for is not None and width is not None and made_for != width:
        hint = f" It was made for a base model of {made_for} input channels, this one has {width}."
    raise ValueError(
        f"Expected {str(plain.path)!r} to fit {name!r}, whose weight has the shape {shape}, but it "
        f"is for {got}.{hint}"
    )
