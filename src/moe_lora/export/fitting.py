"""Find the layers of a model that a plain LoRA file speaks of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moe_lora.adapter_tensors import unwrapped
from moe_lora.export.factors import Factors
from moe_lora.export.kohya import flux_paths, split_flux
from moe_lora.export.plain import PlainFile, StoredFactors, read_plain
from moe_lora.export.sgm import diffusers_name
from moe_lora.export.sources import some
from moe_lora.stored import input_width


def read_lora_for(
    model: nn.Module, path: str | os.PathLike[str], skip: Sequence[str] = ()
) -> dict[str, StoredFactors]:
    """Read a plain LoRA, by the paths of the model's layers.

    Args:
        model: the base model, with or without adapters.
        path: a safetensors file or a folder; keys of PEFT, diffusers or kohya.
        skip: beginnings of keys to leave out, such as those of a text encoder.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: when it cannot be read, names layers that the model does not have, or has other
            sizes than they have.
    """
    plain, layers = read_plain(path, skip), _layers(model)
    flat = {name.replace(".", "_"): name for name in layers}
    widths = {name: shape[0] for name, shape in layers.items()}
    found: dict[str, StoredFactors] = {}
    unknown = []
    depth = getattr(getattr(model, "config", None), "layers_per_block", None)
    sgm = partial(diffusers_name, layers_per_block=depth if isinstance(depth, int) else 2)
    for name, stored in plain.layers.items():
        target = name if name in layers else flat.get(name, flat.get(sgm(name) or ""))
        parts = flux_paths(name)
        if target is not None:
            found[target] = stored
        elif parts and all(part in layers for part in parts):
            split = split_flux(name, Factors(stored.down, stored.up), widths)
            found |= {part: StoredFactors(*f, stored.scale) for part, f in split.items()}
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(
            f"Expected {str(plain.path)!r} to speak of layers of the {type(model).__name__} only, "
            f"but it has no {some(unknown)}. Keys that do not matter here can be left out with "
            "`skip`."
        )
    return {
        name: _fitted(name, stored, layers[name], plain, model) for name, stored in found.items()
    }


def _layers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the weight's shape of every layer that can have a LoRA."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        name = unwrapped(path)
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) and name else module
        if ".base_layer" in name or not isinstance(base, nn.Linear | nn.Conv2d):
            continue
        if isinstance(base, nn.Linear):
            # A quantised weight may have another shape.
            shapes[name] = (base.out_features, base.in_features)
        else:
            shapes[name] = (base.out_channels, base.in_channels // base.groups, *base.kernel_size)
    return shapes


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
