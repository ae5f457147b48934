"""Read plain LoRA files, in whatever layout their makers chose."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from moe_lora.export.factors import Factors
from moe_lora.export.layouts import METADATA_KEY, Format
from moe_lora.export.sources import CONFIG_NAME, read_json, some
from moe_lora.files import read_tensors
from moe_lora.stored import WEIGHTS_NAME

_ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
_KEY = re.compile(f"(.+?)({'|'.join(re.escape(suffix) for suffix in _ROLES)})$")
_PREFIXES: dict[str, Format] = {
    "base_model.model.": "peft",
    "lora_unet_": "kohya",
    "diffusion_model.": "kohya",
    "transformer.": "diffusers",
    "unet.": "diffusers",
}


class StoredFactors(NamedTuple):
    """Hold one layer as a file has it: its change of the weight is `scale · up @ down`.

    Attributes:
        down: `(r, in)` or `(r, in, kh, kw)`.
        up: `(out, r)`.
        scale: alpha / rank.
    """

    down: Tensor
    up: Tensor
    scale: float

    def factors(self) -> Factors:
        """Return the factors with the strength in `up`, which is then at least float32."""
        # Eight-bit floats have no promotion.
        precise = torch.float64 if self.up.dtype == torch.float64 else torch.float32
        return Factors(self.down.to(precise), self.up.to(precise) * self.scale)


@dataclass(frozen=True)
class PlainFile:
    """Hold a plain LoRA as its file names it.

    Attributes:
        path: the weights' file.
        layout: whose keys it has.
        layers: by the file's name of the layer, the layout's prefix taken off.
        metadata: what moe_lora wrote into the file's header; empty for other makers.
        base_model: what its config says that it was made for, if it does.
    """

    path: Path
    layout: Format
    layers: dict[str, StoredFactors]
    metadata: dict[str, Any]
    base_model: str | None = None


def read_plain(path: str | os.PathLike[str], skip: Sequence[str] = ()) -> PlainFile:
    """Read a plain LoRA: a file, or a folder with one.

    Args:
        path: a safetensors file or a folder.
        skip: beginnings of keys to leave out.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: when it is corrupt, no plain LoRA, or of unknown strength.
    """
    file, config = _locate(Path(path))
    tensors, header = read_tensors(file)
    roles: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        if key.startswith(tuple(skip)):
            continue
        match = _KEY.match(key)
        if match is None:
            foreign.append(key)
        else:
            roles.setdefault(match[1], {})[_ROLES[match[2]]] = tensor
    if foreign or not roles:
        raise ValueError(
            f"Expected the keys of a plain LoRA in {str(file)!r}, but got "
            f"{some(foreign) if foreign else 'none'}."
        )
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in roles)), "")
    layout = _PREFIXES.get(prefix, "diffusers")
    strength = _Strength(file, layout, prefix, config, header)
    layers = {}
    for raw, tensor_of in roles.items():
        name = raw.removeprefix(prefix)
        if prefix == "diffusion_model.":
            name = name.replace(".", "_")
        layers[name] = _stored(file, raw, name, tensor_of, strength)
    own = _json_header(file, header, METADATA_KEY)
    return PlainFile(file, layout, layers, own, (config or {}).get("base_model_name_or_path"))


class _Strength:
    """Know the scale of every layer of a file, from whatever the file tells it by."""

    def __init__(
        self,
        file: Path,
        layout: Format,
        prefix: str,
        config: dict[str, Any] | None,
        header: Mapping[str, str],
    ) -> None:
        self.fields = config
        if config is None and "lora_adapter_metadata" in header:
            entries = _json_header(file, header, "lora_adapter_metadata")
            self.fields = {k.removeprefix(prefix): v for k, v in entries.items()} or None
        if self.fields is None and layout == "peft":
            raise ValueError(
                f"Expected a {CONFIG_NAME} beside {str(file)!r}, which tells how strong the LoRA "
                "is, but there is none."
            )

    def of(self, name: str, rank: int, alpha: Tensor | None) -> float:
        """Return the scale of a layer; without any word of it, alpha is the rank."""
        if alpha is not None:
            return float(alpha) / rank
        if self.fields is None:
            return 1.0
        patterns = self.fields.get("alpha_pattern") or {}
        value = patterns.get(get_pattern_key(list(patterns), name), self.fields["lora_alpha"])
        return float(value) / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)


def _locate(path: Path) -> tuple[Path, dict[str, Any] | None]:
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        named = [f for f in files if f.name in (WEIGHTS_NAME, "pytorch_lora_weights.safetensors")]
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
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(
            f"Expected a number as `lora_alpha` in {str(folder / CONFIG_NAME)!r}, but got "
            f"{config.get('lora_alpha')!r}."
        )
    return path, config


def _stored(
    file: Path, raw: str, name: str, tensor_of: Mapping[str, Tensor], strength: _Strength
) -> StoredFactors:
    missing = [role for role in ("down", "up") if role not in tensor_of]
    if missing:
        raise ValueError(
            f"Expected both factors of {raw!r} in {str(file)!r}, but the {missing[0]} one is "
            "missing."
        )
    down, up = tensor_of["down"], tensor_of["up"]
    rank = down.shape[0]
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.flatten(1).shape[1] != rank:
        raise ValueError(
            f"Expected the factors of {raw!r} in {str(file)!r} to be (r, in) and (out, r), but got "
            f"{tuple(down.shape)} and {tuple(up.shape)}."
        )
    if not (down.float().isfinite().all() and up.float().isfinite().all()):
        raise ValueError(
            f"Expected finite factors of {raw!r} in {str(file)!r}, but got NaN or inf."
        )
    return StoredFactors(down, up.flatten(1), strength.of(name, rank, tensor_of.get("alpha")))


def _json_header(file: Path, header: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        entries = json.loads(header.get(key, "{}"))
    except ValueError as error:
        raise ValueError(
            f"Expected JSON as `{key}` in the header of {str(file)!r}, but got {error}."
        ) from error
    return entries if isinstance(entries, dict) else {}
