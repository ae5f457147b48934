"""What routing costs beside arithmetic: a model of many tiny adapted layers.

    python benchmarks/overhead.py

The layers are so small that nearly all of a step is the calls of Python and PyTorch around the
matrix products. Figures are medians; all variants run interleaved in one process.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from measuring import Step, interleaved, machine, table
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moe_lora
from moe_lora import MoELoraConfig

EXPERTS = 3
REFERENCE = "PEFT LoRA"
ROUTINGS = ("uniform", "route", "routed")


class Tower(nn.Module):
    """Stack square layers, in blocks that may be checkpointed."""

    def __init__(self, layers: int, width: int, block: int) -> None:
        super().__init__()
        counts = [min(block, layers - start) for start in range(0, layers, block)]
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(width, width) for _ in range(count))) for count in counts
        )
        self.checkpointed = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointed:
                hidden_states = checkpoint(block, hidden_states, use_reentrant=False)
            else:
                hidden_states = block(hidden_states)
        return hidden_states


class MeanRouter(moe_lora.Router):
    """Route by the mean over tokens; small, since a router's own work is not what is measured."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_logits = nn.Linear(width, EXPERTS)

    def logits(self, inputs: moe_lora.RouterInputs) -> Tensor:
        means: Tensor = self.to_logits(inputs.hidden_states.mean(1))
        return means


def adapted(name: str, args: argparse.Namespace) -> Tower:
    model, targets = Tower(args.layers, args.width, args.block), r".*blocks\.\d+\.\d+"
    if name == REFERENCE:
        rank = EXPERTS * args.rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        get_peft_model(model, config)
        return model
    get_peft_model(model, MoELoraConfig(r=args.rank, num_experts=EXPERTS, target_modules=targets))
    if name == "routed":
        moe_lora.attach_router(model, MeanRouter(args.width))
    return model


def step(model: Tower, x: Tensor, weights: Tensor | None, kind: str) -> Step:
    def run() -> None:
        model.checkpointed = kind == "checkpointed"
        with (
            torch.set_grad_enabled(kind != "inference"),
            nullcontext() if weights is None else moe_lora.route(model, weights),
        ):
            loss = model(x).sum()
        if kind != "inference":
            loss.backward()

    return run


def steps(args: argparse.Namespace) -> dict[str, Step]:
    x = torch.randn(args.batch, args.tokens, args.width)
    given = torch.rand(args.batch, EXPERTS).softmax(-1)
    found: dict[str, Callable[[], None]] = {}
    for name in (REFERENCE, *ROUTINGS):
        model = adapted(name, args)
        for kind in ("inference", "training", "checkpointed"):
            found[f"{kind}, {name}"] = step(model, x, given if name == "route" else None, kind)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=500)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--block", type=int, default=10, help="layers of a block")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=2, help="of each expert")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file, too")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    times = interleaved(steps(args), args.rounds)
    figures = {
        name: {
            "seconds": times.seconds(name),
            "to PEFT LoRA": times.ratio(name, f"{name.partition(',')[0]}, {REFERENCE}"),
        }
        for name in times.rounds
    }
    print(f"{machine()}\n{vars(args)}\n")
    print(
        table(
            ["step", "ms", "us per layer", "to PEFT LoRA"],
            [
                [
                    name,
                    f"{f['seconds'] * 1e3:.2f}",
                    f"{f['seconds'] * 1e6 / args.layers:.1f}",
                    f"{f['to PEFT LoRA']:.2f}",
                ]
                for name, f in figures.items()
            ],
        )
    )
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
