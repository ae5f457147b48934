"""The subcommands `inspect`, `export` and `merge`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections import Counter
from typing import Any

import torch

from moe_lora.export.describe import describe
from moe_lora.export.expert_table import table_of_checkpoint
from moe_lora.export.fixed_weights import weights_for_checkpoint
from moe_lora.export.merge_into_files import merge_into_files
from moe_lora.export.to_lora import write_mixture


def inspect(options: argparse.Namespace) -> None:
    """Print the experts, ranks, layers and norms of a checkpoint or a plain LoRA."""
    found = describe(options.path)
    print(json.dumps(found, indent=2) if options.json else _format_description(found))


def export(options: argparse.Namespace) -> None:
    """Write one plain LoRA of a fixed mixture."""
    table, _ = table_of_checkpoint(options.checkpoint)
    weights = weights_for_checkpoint(options.weights, table.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = write_mixture(
            table,
            weights,
            options.out,
            format=options.format,
            rank=options.rank,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            tool=options.tool,
        )
    for warning in caught:
        print(f"moe-lora: warning: {warning.message}", file=sys.stderr)
    if options.json:
        print(json.dumps({**dataclasses.asdict(report), "path": str(report.path)}, indent=2))
    else:
        print(report)


def merge(options: argparse.Namespace) -> None:
    """Write a base model with a fixed mixture merged in."""
    table, _ = table_of_checkpoint(options.checkpoint)
    chosen = weights_for_checkpoint(options.weights, table.config)
    lora = table.mixed(chosen.weights)
    files = merge_into_files(lora, options.base, options.out, table.base_class)
    weights = dict(zip(table.names, chosen.weights.tolist(), strict=True))
    if options.json:
        written = {"path": options.out, "files": [str(f) for f in files], "layers": len(lora)}
        print(json.dumps({**written, "weights": weights}, indent=2))
    else:
        mixed = ", ".join(f"{name}={weight:.4g}" for name, weight in weights.items())
        print(f"{options.out}: {len(lora)} layers in {len(files)} files, {mixed}")


def _format_description(found: dict[str, Any]) -> str:
    layers: dict[str, Any] = found["layers"]
    ranks = Counter(layer["rank"] for layer in layers.values()).most_common()
    ranks_text = ", ".join(f"rank {rank} in {count}" for rank, count in ranks)
    if found["kind"] == "mixture":
        lines = [
            f"mixture of {len(found['experts'])} experts in {len(layers)} layers ({ranks_text})"
        ]
        lines += [f"experts: {', '.join(found['experts'])}", f"router: {_router(found['router'])}"]
        columns = found["experts"]
        rows = {name: [layer["norms"][c] for c in columns] for name, layer in layers.items()}
        rows["all layers"] = [found["norms"][c] for c in columns]
    else:
        lines = [f"plain LoRA in {len(layers)} layers ({ranks_text}), {found['layout']} layout"]
        if found["moe_lora"] is not None:
            lines.append(f"moe_lora: {json.dumps(found['moe_lora'])}")
        columns = ["norm"]
        rows = {name: [layer["norm"]] for name, layer in layers.items()}
        rows["all layers"] = [found["norm"]]
    base = {key: value for key, value in found["base"].items() if value is not None}
    lines.append(f"base: {', '.join(f'{k} {v}' for k, v in base.items()) or 'not recorded'}")
    return "\n".join([*lines, "", *_table(rows, columns, layers)])


def _router(router: dict[str, Any] | None) -> str:
    if router is None:
        return "none"
    top_k = "" if router["top_k"] is None else f", top_k {router['top_k']}"
    return (
        f"{router['name']} ({router['strategy']}, temperature {router['temperature']:g}{top_k}), "
        f"{router['parameters']} parameters"
    )


def _table(rows: dict[str, list[float]], columns: list[str], layers: dict[str, Any]) -> list[str]:
    first = max(len(name) for name in [*rows, "Frobenius norms of s·BA"])
    widths = [max(len(column), 9) for column in columns]
    head = [f"{'Frobenius norms of s·BA':<{first}}", "rank"]
    lines = ["  ".join([*head, *(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))])]
    for name, norms in rows.items():
        rank = layers[name]["rank"] if name in layers else ""
        cells = [f"{norm:>{w}.4g}" for norm, w in zip(norms, widths, strict=True)]
        lines.append("  ".join([f"{name:<{first}}", f"{rank!s:>4}", *cells]))
    return lines
