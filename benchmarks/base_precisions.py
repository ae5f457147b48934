"""Memory and time of a Flux training step by the base model's precision, beside the plan's memory.

    python benchmarks/base_precisions.py --size flux --device cuda

The models are built one after another; int8 is torchao's, nf4 that of bitsandbytes. "base" is the
memory of the frozen model, "peak" that of a whole step, the base included, and "planned" what
`moe_lora.planning.plan_training` computes for it. "off by" is the error of the base model's
velocity relative to that of bf16.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from flux_variants import EXPERTS, SIZES, TARGETS, Training, build, make_inputs
from measuring import MIB, interleaved, machine, peak_bytes, table, tensors_of
from peft import get_peft_model
from torch import Tensor, nn

from moe_lora import MoELoraConfig
from moe_lora.planning import plan_training

PRECISIONS = ("bf16", "int8", "nf4")


def quantize(model: nn.Module, precision: str) -> nn.Module:
    """Replace the weights of the blocks' linear layers by quantized ones, a layer at a time."""
    if precision == "int8":
        torchao: Any = importlib.import_module("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    if precision == "nf4":
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, nf4_layer(child))
    return model


def nf4_layer(linear: nn.Linear) -> nn.Module:
    """Return a layer of bitsandbytes with the weights of another, which are quantized."""
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    made: nn.Module = bnb.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_type="nf4",
        compute_dtype=linear.weight.dtype,
        device="meta",
    )
    weight, device = linear.weight.data, linear.weight.device
    made.weight = bnb.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4").to(device)
    made.bias = linear.bias
    return made.requires_grad_(False)


@torch.no_grad()
def velocity(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**inputs, return_dict=False)[0]
    return found.float()


def stored_bytes(model: nn.Module) -> int:
    """Count the memory of all weights; quantized ones hold their parts in other tensors."""
    count = 0
    for tensor in tensors_of(model):
        names = getattr(tensor, "__tensor_flatten__", lambda: (None,))()[0]
        parts = [getattr(tensor, name) for name in names] if names else [tensor]
        state = getattr(tensor, "quant_state", None)
        parts += [state.absmax] if state is not None else []
        count += sum(part.numel() * part.element_size() for part in parts)
    return count


def row(precision: str, expected: Tensor | None, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one precision; the first row's velocity is what the others are compared with."""
    size = SIZES[args.size]
    torch.manual_seed(0)
    base = build(size, args.device, torch.bfloat16)
    inputs = make_inputs(size, args.device, torch.bfloat16)
    config = MoELoraConfig(
        r=args.rank,
        lora_alpha=args.rank,
        num_experts=EXPERTS,
        target_modules=TARGETS,
        router="three_expert_removal",
    )
    plan = plan_training(base, config, inputs, base_precision=precision, checkpointing=True)
    quantize(base, precision)
    found = velocity(base, inputs)
    weights = stored_bytes(base)
    base.enable_gradient_checkpointing()
    step = Training(get_peft_model(base, config), inputs)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16):
        times = interleaved({"step": step}, args.rounds, warmup=1, device=args.device)
        rise = peak_bytes(step, args.device)
    # Weights of experts, gradients and moments are there before and after the measured step.
    optimizer = sum(t.numel() * t.element_size() for t in optimizer_tensors(step))
    adapter = sum(p.numel() * p.element_size() for p in base.parameters() if p.requires_grad)
    return {
        "precision": precision,
        "seconds": times.seconds("step"),
        "base": weights,
        "peak": weights + adapter + optimizer + rise,
        "planned": plan.total,
        "off by": 0.0 if expected is None else float((found - expected).norm() / expected.norm()),
        "velocity": found,
    }


def optimizer_tensors(step: Training) -> list[Tensor]:
    states = step.optimizer.state.values()
    return [v for state in states for v in state.values() if isinstance(v, Tensor)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file, too")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rank", type=int, default=16, help="of each expert")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    told = machine(args.device, ("torch", "peft", "diffusers"))
    print(f"{told}\n{args.size} ({SIZES[args.size]}), {EXPERTS} experts of rank {args.rank}\n")
    rows: list[dict[str, Any]] = []
    expected: Tensor | None = None
    for precision in args.precisions:
        found = row(precision, expected, args)
        velocity_found = found.pop("velocity")
        expected = velocity_found if expected is None else expected
        rows.append(found)
        gc.collect()
    columns = ["base", "peak", "planned"]
    print(
        table(
            [
                "base precision",
                "s",
                *(f"{name} MiB" for name in columns),
                "planned / peak",
                "off by",
            ],
            [
                [
                    r["precision"],
                    f"{r['seconds']:.3f}",
                    *(f"{r[name] / MIB:.1f}" for name in columns),
                    f"{r['planned'] / r['peak']:.3f}",
                    f"{r['off by']:.4f}",
                ]
                for r in rows
            ],
        )
    )
    if args.json:
        result = {"machine": told, "options": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
