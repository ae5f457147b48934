"""Export a mixture under fixed weights as one plain LoRA."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from moe_lora.checkpoint_reader import DIFFUSERS_NAME
from moe_lora.export.compression import compress
from moe_lora.export.expert_table import ExpertTable, table_of_model
from moe_lora.export.fixed_weights import FixedWeights, weights_for_model
from moe_lora.export.formats import Format
from moe_lora.export.formats.diffusers import diffusers_file
from moe_lora.export.formats.kohya import kohya_tensors
from moe_lora.export.formats.metadata import header
from moe_lora.export.formats.peft import peft_tensors, plain_config
from moe_lora.export.formats.tools import TOOLS, Tool, refusal
from moe_lora.export.listing import first_few
from moe_lora.export.lora_factors import Factors, PlainLora
from moe_lora.safetensors_io import replacing, write_tensors
from moe_lora.tuner.state_dict.stored import WEIGHTS_NAME


@dataclass(frozen=True)
class ExportReport:
    """Report of `export_lora`.

    Attributes:
        path: the file, or the folder of format "peft".
        format: the key layout.
        weights: the weight of every expert, those that were left out at 0 included.
        source: where the weights come from: "given", "expert", "uniform", "mean", "for" or "fixed".
        ranks: the rank of every layer in the file.
        relative_error: Frobenius error of the compression over all layers, relative to their norm;
            0 without compression.
        layer_errors: the same for every layer.
    """

    path: Path
    format: Format
    weights: dict[str, float]
    source: str
    ranks: dict[str, int]
    relative_error: float
    layer_errors: dict[str, float]

    def __str__(self) -> str:
        mixed = ", ".join(f"{name}={weight:.4g}" for name, weight in self.weights.items())
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return (
            f"{self.path}: {len(self.ranks)} layers of {ranks} in the {self.format} layout, "
            f"{mixed} ({self.source}), relative error {self.relative_error:.3g}"
        )


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    weights: Tensor | Sequence[float] | str | None = None,
    *,
    format: Format = "diffusers",
    adapter_name: str = "default",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    inputs: Mapping[str, Any] | None = None,
    tool: Tool | None = None,
) -> ExportReport:
    """Write one plain LoRA that equals the mixture under fixed weights.

    `A = cat(A_e)`, `B = cat(w_e · s · B_e)`, over the experts whose weight is not 0. The strength
    is in `B` and alpha equals the rank, so that no loader can misread it.

    Args:
        model: the adapted model, or a wrapper around it.
        path: a file, or a folder in which `pytorch_lora_weights.safetensors` is written; for "peft"
            always a folder, which is replaced.
        weights: `(E,)` numbers; an expert's name; "uniform"; "mean" for the mean over the recorded
            `routing_stats`; "for" for what the router says of `inputs`; or `None` for the weights
            that the model's routing fixes (uniform mode, no router, a router that reads nothing).
        format: "diffusers" for `pipe.load_lora_weights`, "peft" for `PeftModel.from_pretrained`,
            "kohya" for tools that read `lora_unet_` keys (Flux and SD 1.5-like UNets).
        adapter_name: whose experts.
        rank: compress every layer to at most this rank, by SVD.
        dtype: what the file holds; the experts' dtype by default.
        inputs: with `weights="for"`, the arguments of `weights_for` by name: those of the model's
            own call, and `mask`, `image` and so on where the call does not carry them.
        tool: "diffusers", "peft", "comfyui", "sd-scripts" or "invokeai"; warns if this tool would
            not load the file, or would drop layers of it.

    Returns:
        What was written, with the relative error of the compression, which the file holds, too.

    Raises:
        TypeError: for a dtype that is not floating point.
        ValueError: when `weights` is `None` and the router computes them from the input; for
            weights, a rank or a format that cannot be honored; for NaN or inf in what would be
            written; for layers that a consumer of the format would silently drop; or when a folder
            holds other files.
    """
    table = table_of_model(model, adapter_name)
    chosen = weights_for_model(model, weights, adapter_name=adapter_name, inputs=inputs)
    return write_mixture(table, chosen, path, format=format, rank=rank, dtype=dtype, tool=tool)


def write_mixture(
    table: ExpertTable,
    chosen: FixedWeights,
    path: str | os.PathLike[str],
    *,
    format: Format = "diffusers",
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    tool: Tool | None = None,
) -> ExportReport:
    """Write the mixture of a table of experts; see `export_lora`.

    Args:
        table: the experts.
        chosen: the fixed weights.
        path: as in `export_lora`; so are the other arguments.
    """
    if format not in get_args(Format):
        raise ValueError(
            f"Expected `format` to be one of {list(get_args(Format))}, but got {format!r}."
        )
    if tool is not None and tool not in TOOLS:
        raise ValueError(f"Expected `tool` to be one of {list(TOOLS)}, but got {tool!r}.")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"Expected `dtype` to be a floating-point type, but got {dtype}.")
    lora, error = table.mixed(chosen.weights), 0.0
    layer_errors = dict.fromkeys(lora, 0.0)
    if rank is not None:
        lora, error, layer_errors = compress(lora, rank)
    _check_range(lora, dtype)
    if dtype is not None:
        lora = {path: Factors(f.down.to(dtype), f.up.to(dtype)) for path, f in lora.items()}
    report = ExportReport(
        path=_output_path(Path(path), format),
        format=format,
        weights=dict(zip(table.names, chosen.weights.tolist(), strict=True)),
        source=chosen.source,
        ranks={layer: factors.rank for layer, factors in lora.items()},
        relative_error=error,
        layer_errors=layer_errors,
    )
    _write(lora, table, report)
    refused = refusal(tool, format, lora, table.base_class) if tool else None
    if refused:
        warnings.warn(refused, stacklevel=3)
    return report


def _check_range(lora: PlainLora, dtype: torch.dtype | None) -> None:
    # Written out, since a cast to eight bits saturates without a word.
    largest = {
        path: float(torch.stack([factor.double().abs().max() for factor in held]).max())
        for path, held in lora.items()
    }
    broken = [path for path, value in largest.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"Expected finite weights to export, but those of {first_few(broken)} hold NaN or inf."
        )
    limit = math.inf if dtype is None else torch.finfo(dtype).max
    large = [path for path, value in largest.items() if value > limit]
    if large:
        raise ValueError(
            f"Expected weights within the range of {dtype}, up to {limit:g}, but those of "
            f"{first_few(large)} are larger. Take a wider `dtype`."
        )


def _write(lora: PlainLora, table: ExpertTable, report: ExportReport) -> None:
    metadata = _metadata(table, report)
    if report.format == "peft":
        config = plain_config(lora, table.config.base_model_name_or_path)
        with replacing(report.path) as temporary:
            write_tensors(temporary / WEIGHTS_NAME, peft_tensors(lora), metadata)
            config.save_pretrained(str(temporary))
    elif report.format == "diffusers":
        tensors, own = diffusers_file(lora, table.base_class)
        write_tensors(report.path, tensors, {**metadata, **own})
    else:
        write_tensors(report.path, kohya_tensors(lora, table.base_class), metadata)


def _metadata(table: ExpertTable, report: ExportReport) -> dict[str, str]:
    return header(
        weights=report.weights,
        weights_from=report.source,
        base_model=table.config.base_model_name_or_path,
        base_class=table.base_class,
        in_channels=table.in_channels,
        relative_error=report.relative_error,
    )


def _output_path(path: Path, format: Format) -> Path:
    if format != "peft":
        file = path if path.suffix == ".safetensors" else path / DIFFUSERS_NAME
        if file.is_dir() or (file != path and path.exists() and not path.is_dir()):
            raise ValueError(
                f"Expected a folder or a name ending in '.safetensors' to write to, but "
                f"{str(path)!r} is a {'folder' if file.is_dir() else 'file'}."
            )
        return file
    if path.suffix == ".safetensors" or path.is_file():
        raise ValueError(f'Expected a folder for format="peft", but got the file {str(path)!r}.')
    if path.is_dir():
        others = sorted({entry.name for entry in path.iterdir()} - {CONFIG_NAME, WEIGHTS_NAME})
        if others:
            raise ValueError(
                f"Expected {str(path)!r} to be a new folder or an earlier export, since it is "
                f"replaced as a whole, but it holds {others[0]!r}."
            )
    return path
