"""Merge a plain LoRA into the files of a base model, one file at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_lora.export.listing import first_few
from moe_lora.export.lora_factors import Factors, PlainLora
from moe_lora.safetensors_io import (
    TensorHeader,
    read_header,
    read_json,
    read_tensors,
    replacing,
    write_tensors,
)

_COMPONENTS = ("transformer", "unet")
_FLOATS = ("F16", "BF16", "F32", "F64")


def merge_into_files(
    lora: PlainLora,
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base_class: str | None = None,
) -> list[Path]:
    """Write a copy of a base model's folder with a plain LoRA merged into its weights.

    `W ← W + B A`, computed in float32 and stored in the dtype of `W`. Only one weights file is in
    memory at a time.

    Args:
        lora: by the layers' paths in the base model.
        base: a diffusers model's folder, or a pipeline's folder with `transformer/` or `unet/`; all
            else in it is copied.
        out: a new folder.
        base_class: what class the model should be, if it is known.

    Returns:
        The weights files that were changed.

    Raises:
        FileNotFoundError: when there is no model.
        ValueError: when `out` is taken, or the base model is of another class, lacks a layer, has
            other sizes, or has weights that are not floating point. Nothing is written then.
    """
    base, out = Path(base), Path(out)
    _check_free(base, out)
    component = _component(base)
    _check_class(component, base_class)
    files = sorted(component.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"Expected safetensors files in {str(component)!r}, but there are none."
        )
    _check_weights(lora, component, [read_header(file)[0] for file in files])
    stale = {file.name for file in component.iterdir() if file.suffix in (".safetensors", ".bin")}
    changed = []
    with replacing(out) as temporary:

        def leave_out(folder: str, names: list[str]) -> set[str]:
            return stale.intersection(names) if Path(folder) == component else set()

        shutil.copytree(base, temporary, ignore=leave_out, dirs_exist_ok=True)
        for file in files:
            target = file.relative_to(base)
            tensors, header = read_tensors(file)
            concerned = {path for path in lora if f"{path}.weight" in tensors}
            for path in concerned:
                key = f"{path}.weight"
                tensors[key] = _merged(path, tensors[key], lora[path])
            write_tensors(temporary / target, tensors, header)
            if concerned:
                changed.append(out / target)
    return changed


@torch.no_grad()
def _merged(path: str, weight: Tensor, factors: Factors) -> Tensor:
    delta = factors.delta()
    merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
    if not merged.isfinite().all():
        raise ValueError(f"Expected finite merged weights, but {path!r} gives NaN or inf.")
    return merged


def _component(base: Path) -> Path:
    candidates = [base, *(base / name for name in _COMPONENTS)]
    found = [folder for folder in candidates if (folder / "config.json").is_file()]
    if len(found) != 1:
        raise FileNotFoundError(
            f"Expected one diffusers model in {str(base)!r}, with a config.json there or in one of "
            f"{list(_COMPONENTS)}, but found {len(found)}."
        )
    return found[0]


def _check_free(base: Path, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"Expected a new folder to write to, but {str(out)!r} is taken.")
    if out.resolve().is_relative_to(base.resolve()):
        raise ValueError(f"Expected a folder outside {str(base)!r}, but got {str(out)!r}.")


def _check_class(component: Path, base_class: str | None) -> None:
    got = read_json(component / "config.json").get("_class_name")
    if base_class is not None and got is not None and got != base_class:
        raise ValueError(
            f"Expected a {base_class}, which the experts were trained on, in {str(component)!r}, "
            f"but got a {got}."
        )


def _check_weights(
    lora: PlainLora, component: Path, headers: Sequence[Mapping[str, TensorHeader]]
) -> None:
    known = {key: entry for entries in headers for key, entry in entries.items()}
    missing = [path for path in lora if f"{path}.weight" not in known]
    if missing:
        raise ValueError(
            f"Expected the base model in {str(component)!r} to have the adapted layers, but it has "
            f"no {first_few(missing)}."
        )
    for path, factors in lora.items():
        shape, dtype = known[f"{path}.weight"]
        expected = (factors.up.shape[0], *factors.down.shape[1:])
        if shape != expected:
            raise ValueError(
                f"Expected the weight of {path!r} in {str(component)!r} to have shape {expected}, "
                f"but got {shape}: the experts were trained on another base model."
            )
        if dtype not in _FLOATS:
            raise ValueError(
                f"Expected the weight of {path!r} in {str(component)!r} to be one of "
                f"{list(_FLOATS)}, but got {dtype}. Take the unquantized base model."
            )
