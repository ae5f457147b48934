"""Read plain LoRA files of any layout."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from moe_lora.checkpoint_reader import DIFFUSERS_KEY, DIFFUSERS_NAME
from moe_lora.export.formats import Layout, kohya
from moe_lora.export.formats.flux_names import flux_paths
from moe_lora.export.formats.lora_config import LoraScaling
from moe_lora.export.formats.metadata import METADATA_KEY
from moe_lora.export.listing import first_few
from moe_lora.export.lora_factors import Factors
from moe_lora.safetensors_io import read_json, read_tensors
from moe_lora.tuner.state_dict.stored import WEIGHTS_NAME, read_header

_ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_B.bias": "bias",
    ".alpha": "alpha",
}
_KEY = re.compile(f"(.+?)({'|'.join(re.escape(suffix) for suffix in _ROLES)})$")
# What Black Forest Labs' files have beside factors: whole norms of the queries and keys.
_NORM = re.compile(
    r"(?:diffusion_model\.)?(double|single)_blocks\.\d+\.(?:.+\.)?norm\.(query|key)_norm\.scale$"
)
# VeLoRA's, of the backward pass only.
_TRAINING_ONLY = (".lora_velora_embed",)
_PREFIXES: dict[str, Layout] = {
    "base_model.model.": "peft",
    kohya.PREFIX: "kohya",
    "diffusion_model.": "original",
    "transformer.": "diffusers",
    "unet.": "diffusers",
}


class StoredFactors(NamedTuple):
    """One layer as a file has it: its change of the weight is `scaling · up @ down`.

    Attributes:
        down: `(r, in)` or `(r, in, kh, kw)`.
        up: `(out, r)`.
        scaling: alpha / rank.
    """

    down: Tensor
    up: Tensor
    scaling: float

    def factors(self) -> Factors:
        """Return the factors with the strength in `up`, which is then at least float32."""
        precise = torch.promote_types(self.up.dtype, torch.float32)
        return Factors(self.down.to(precise), self.up.to(precise) * self.scaling)


@dataclass(frozen=True)
class LoraFile:
    """A plain LoRA, by the names of its file.

    Attributes:
        path: the weights' file.
        layout: whose keys it has.
        layers: by the file's name of the layer, the layout's prefix taken off.
        metadata: what moe_lora wrote into the file's header; empty for other makers.
        base_model: what its config says that it was made for, if it does.
        norms: whole weights of norms by the file's keys, which must be those of the base model.
    """

    path: Path
    layout: Layout
    layers: dict[str, StoredFactors]
    metadata: dict[str, Any]
    base_model: str | None = None
    norms: Mapping[str, Tensor] = field(default_factory=dict)


def read_lora_file(path: str | os.PathLike[str], skip: Sequence[str] = ()) -> LoraFile:
    """Read a plain LoRA: a file, or a folder with one.

    Args:
        path: a safetensors file or a folder.
        skip: beginnings of keys to leave out.

    Raises:
        FileNotFoundError: when there is nothing.
        TypeError: when `skip` is a string.
        ValueError: when it is corrupt, no plain LoRA, or of unknown scaling.
    """
    if isinstance(skip, str):
        raise TypeError(f"Expected `skip` to be a list of beginnings of keys, but got {skip!r}.")
    file, config = _locate(Path(path))
    tensors, header = read_tensors(file)
    roles, foreign = _by_layer(file, tensors, tuple(skip))
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in roles)), "")
    original = not prefix and any(flux_paths(name.replace(".", "_")) for name in roles)
    layout = "original" if original else _PREFIXES.get(prefix, "diffusers")
    scaling = _scaling_of(file, layout, prefix, config, header)
    if foreign or not roles:
        raise ValueError(
            f"Expected the keys of a plain LoRA in {str(file)!r}, but got "
            f"{first_few(foreign) if foreign else 'none'}."
        )
    layers = {
        name.removeprefix(prefix): _stored(file, name, name.removeprefix(prefix), held, scaling)
        for name, held in roles.items()
    }
    if len(layers) < len(roles):
        raise ValueError(
            f"Expected one LoRA for every layer in {str(file)!r}, but some have several, with and "
            f"without {prefix!r}. Leave one kind out with `skip`."
        )
    own = read_header(file, header, METADATA_KEY) or {}
    base_model = (config or {}).get("base_model_name_or_path")
    norms = {k: v for k, v in tensors.items() if _NORM.match(k) and not k.startswith(tuple(skip))}
    return LoraFile(file, layout, layers, own, base_model, norms)


def _by_layer(
    file: Path, tensors: Mapping[str, Tensor], skip: tuple[str, ...]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return tensors by layer and role, and the keys that are none of a plain LoRA's."""
    roles: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        if key.startswith(skip) or _NORM.match(key) or key.endswith(_TRAINING_ONLY):
            continue
        match = _KEY.match(key)
        if match is None:
            foreign.append(key)
            continue
        held, role = roles.setdefault(match[1], {}), _ROLES[match[2]]
        if role in held:
            raise ValueError(
                f"Expected one {role} factor of {match[1]!r} in {str(file)!r}, but got several, in "
                "different layouts."
            )
        if not tensor.dtype.is_floating_point and role != "alpha":
            raise ValueError(
                f"Expected floating-point tensors in {str(file)!r}, but {key!r} is {tensor.dtype}."
            )
        # torch has no arithmetic of 8-bit floats.
        held[role] = tensor.float() if tensor.element_size() == 1 else tensor
    return roles, foreign


def _scaling_of(
    file: Path,
    layout: Layout,
    prefix: str,
    config: dict[str, Any] | None,
    header: Mapping[str, str],
) -> LoraScaling:
    if config is not None:
        return LoraScaling(config, repr(str(file.parent / CONFIG_NAME)))
    entries = read_header(file, header, DIFFUSERS_KEY) or {}
    fields = {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}
    if not fields and layout == "peft":
        raise ValueError(
            f"Expected a {CONFIG_NAME} beside {str(file)!r}, which tells how strong the LoRA "
            "is, but there is none."
        )
    return LoraScaling(fields or None, f"the header of {str(file)!r}")


def _locate(path: Path) -> tuple[Path, dict[str, Any] | None]:
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        named = [f for f in files if f.name in (WEIGHTS_NAME, DIFFUSERS_NAME)]
        if len(named or files) != 1:
            raise FileNotFoundError(
                f"Expected one safetensors file in {str(path)!r}, but there are "
                f"{[file.name for file in named or files]}."
            )
        path = (named or files)[0]
    if path.name != WEIGHTS_NAME or not (folder / CONFIG_NAME).is_file():
        return path, None
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"Expected a plain LoRA in {str(folder)!r}, but its {CONFIG_NAME} is of a "
            f"{config.get('peft_type')!r} adapter."
        )
    return path, config


def _stored(
    file: Path, raw: str, name: str, tensor_of: Mapping[str, Tensor], scaling: LoraScaling
) -> StoredFactors:
    missing = [role for role in ("down", "up") if role not in tensor_of]
    if missing:
        raise ValueError(
            f"Expected both factors of {raw!r} in {str(file)!r}, but the {missing[0]} one is "
            "missing."
        )
    down, up = tensor_of["down"], tensor_of["up"]
    rank = down.shape[0]
    if (
        rank < 1
        or down.ndim not in (2, 4)
        or up.ndim not in (2, 4)
        or up.flatten(1).shape[1] != rank
    ):
        raise ValueError(
            f"Expected the factors of {raw!r} in {str(file)!r} to be (r, in) and (out, r), but got "
            f"{tuple(down.shape)} and {tuple(up.shape)}."
        )
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ValueError(
            f"Expected finite factors of {raw!r} in {str(file)!r}, but got NaN or inf."
        )
    if "bias" in tensor_of and tensor_of["bias"].any():
        raise ValueError(
            f"Expected a plain LoRA in {str(file)!r}, but {raw!r} also changes the layer's bias, "
            "which an expert cannot. Merge it into the base model instead."
        )
    return StoredFactors(down, up.flatten(1), scaling.of_layer(name, rank, tensor_of.get("alpha")))
