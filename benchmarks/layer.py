"""Forward and backward of one adapted frozen linear layer, beside PEFT's LoRA of equal rank.

    python benchmarks/layer.py

All variants run interleaved in one process; the figures are medians, as ratios to the bare layer.
Total rank E * r is the same everywhere, so that the FLOP limit is too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig


def saved_bytes(step: Callable[[], Tensor]) -> int:
    """Count what a forward pass saves for backward beside parameters and its input."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def mixture_of(base: nn.Linear, experts: int, rank: int) -> PeftModel:
    config = MoELoraConfig(r=rank // experts, num_experts=experts, target_modules=["0"])
    return get_peft_model(nn.Sequential(copy_of(base)), config)


def copy_of(base: nn.Linear) -> nn.Linear:
    copy = nn.Linear(base.in_features, base.out_features)
    copy.load_state_dict(base.state_dict())
    return copy.requires_grad_(False)


def variants(
    width: int, tokens: int, batch: int, rank: int, experts: list[int]
) -> dict[str, Callable[[], Tensor]]:
    base = nn.Linear(width, width).requires_grad_(False)
    x = torch.randn(batch, tokens, width, requires_grad=True)
    plain = get_peft_model(
        nn.Sequential(copy_of(base)), LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    )
    steps = {"bare layer": lambda: base(x), f"PEFT LoRA r={rank}": lambda: plain(x)}
    for count in experts:
        mixed = mixture_of(base, count, rank)
        shapes = {
            "uniform": None,
            "per sample": (batch, count),
            "per token": (batch, tokens, count),
        }
        for name, shape in shapes.items():
            weights = None if shape is None else torch.rand(shape).softmax(-1).requires_grad_()

            def step(mixed: PeftModel = mixed, weights: Tensor | None = weights) -> Tensor:
                if weights is None:
                    return mixed(x)
                with moe_lora.route(mixed, weights):
                    return mixed(x)

            steps[f"E={count} {name}"] = step
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=192)
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 3, 8, 16])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    steps = variants(args.width, args.tokens, args.batch, args.rank, args.experts)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step().sum().backward()
            if round_ >= 3:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    bare = medians["bare layer"]
    # The frozen base costs two products of width x width (output and input gradient); A and B cost
    # three each (weight gradient besides), of rank x width.
    limit = 1 + 3 * args.rank / args.width
    print(f"{'variant':22} {'time / bare':>11} {'saved, MiB':>11}")
    for name, value in medians.items():
        print(f"{name:22} {value / bare:11.2f} {saved_bytes(steps[name]) / 2**20:11.1f}")
    print(f"{'FLOP limit':22} {limit:11.2f}")


if __name__ == "__main__":
    main()
