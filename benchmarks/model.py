"""A whole Flux training step and a denoising step, beside PEFT LoRA of equal parameters.

    python benchmarks/model.py
    python benchmarks/model.py --size flux --device cuda --dtype bf16 --modes checkpointing

All variants share one frozen base model and run interleaved in one process. Total rank E * r is the
same everywhere. Ratios are medians over the rounds of the time relative to PEFT LoRA's, or to the
bare model's, in the same round. "peak" is by how much the memory in use rises during a step;
"saved" is what the forward pass keeps for backward beside parameters and inputs.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from flux_variants import (
    BARE,
    EXPERTS,
    INFERENCE_ONLY,
    REFERENCE,
    SIZES,
    VARIANTS,
    Training,
    build,
    make_inputs,
    sharing,
)
from measuring import (
    DTYPES,
    MIB,
    Step,
    Times,
    add_options,
    interleaved,
    machine,
    peak_bytes,
    table,
)
from torch import Tensor, nn

MODES = ["plain", "checkpointing", "compiled", "compiled checkpointing"]


def prepare(model: FluxTransformer2DModel, mode: str) -> FluxTransformer2DModel:
    if "checkpointing" in mode:
        model.enable_gradient_checkpointing()
    if "compiled" in mode:
        model.compile_repeated_blocks()
    return model


@torch.no_grad()
def denoise(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    velocity: Tensor = model(**inputs, return_dict=False)[0]
    return velocity


def ratio(times: Times, name: str, reference: str) -> str:
    return f"{times.ratio(name, reference):.3f}" if reference in times.rounds else ""


def training_rows(
    base: FluxTransformer2DModel, inputs: dict[str, Tensor], mode: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    steps = {
        name: Training(prepare(VARIANTS[name](base, args.rank), mode), inputs)
        for name in args.variants
        if name not in INFERENCE_ONLY
    }
    times = interleaved(steps, args.rounds, warmup=args.warmup, device=args.device)
    rows = []
    for name, step in steps.items():
        # A hook on saved tensors would make a compiled model compile anew.
        saved = None if "compiled" in mode else step.saved()
        rows.append(
            {
                "step": "training",
                "mode": mode,
                "variant": name,
                "parameters": step.parameters,
                "seconds": times.seconds(name),
                "/ PEFT LoRA": ratio(times, name, REFERENCE),
                "peak": peak_bytes(step, args.device),
                "saved": saved,
            }
        )
    return rows


def denoising_rows(
    base: FluxTransformer2DModel, inputs: dict[str, Tensor], mode: str, args: argparse.Namespace
) -> list[dict[str, Any]]:
    models = {name: VARIANTS[name](base, args.rank).eval() for name in args.variants}
    if BARE in models and "compiled" in mode:
        models[BARE] = sharing(base).eval()
    steps: dict[str, Step] = {
        name: partial(denoise, prepare(model, mode), inputs) for name, model in models.items()
    }
    times = interleaved(steps, args.rounds, warmup=args.warmup, device=args.device)
    return [
        {
            "step": "denoising",
            "mode": mode,
            "variant": name,
            "seconds": times.seconds(name),
            "/ PEFT LoRA": ratio(times, name, REFERENCE),
            "/ bare": ratio(times, name, BARE),
            "peak": peak_bytes(step, args.device),
        }
        for name, step in steps.items()
    ]


def shown(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if column in ("peak", "saved"):
        return f"{value / MIB:.1f}"
    if column == "seconds":
        return f"{value:.4f}"
    return str(value)


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the figures of one kind of step as a Markdown table."""
    columns = [column for column in rows[0] if column not in ("step", "mode")]
    return table(columns, ([shown(row, column) for column in columns] for row in rows))


def report(rows: list[dict[str, Any]]) -> None:
    if rows:
        print(f"\n{rows[0]['step']}, {rows[0]['mode']}; memory in MiB\n")
        print(table_of(rows))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds=9)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rank", type=int, default=16, help="of each expert")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument(
        "--steps", nargs="+", choices=["training", "denoising"], default=["training", "denoising"]
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    # Every variant compiles its own version of a block; falling back to eager would not be told.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    size, dtype = SIZES[args.size], DTYPES[args.dtype]
    base = build(size, args.device, dtype)
    inputs = make_inputs(size, args.device, dtype)
    told = machine(args.device, ("torch", "peft", "diffusers"))
    print(f"{told}\n{args.size} ({size}), {args.dtype}, {EXPERTS} experts of rank {args.rank}")
    tables = []
    for mode in args.modes:
        if "training" in args.steps:
            tables.append(training_rows(base, inputs, mode, args))
            report(tables[-1])
        if "denoising" in args.steps and "checkpointing" not in mode:
            tables.append(denoising_rows(base, inputs, mode, args))
            report(tables[-1])
    if args.json:
        rows = [row for table in tables for row in table]
        result = {"machine": told, "options": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
