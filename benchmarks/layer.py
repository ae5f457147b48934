"""Forward and backward of one adapted frozen linear layer, beside what PEFT offers.

    python benchmarks/layer.py
    python benchmarks/layer.py --device cuda --dtype bf16 --width 3072 --tokens 4608 --batch 1

All variants run interleaved in one process; the figures are medians. The total rank E * r is the
same everywhere, so that the FLOP limit is, too. The frozen base costs two products of width x width
(the output's and the input gradient's), the adapter six of rank x width: 1 + 3 rank / width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import (
    DTYPES,
    MIB,
    add_options,
    interleaved,
    machine,
    peak_bytes,
    saved_bytes,
    table,
    tensors_of,
)
from peft import ArrowConfig, LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import Tensor, nn

import moe_lora
from moe_lora import MoELoraConfig

Forward = Callable[[Tensor], Tensor]


class Case:
    """Build every variant around one frozen layer.

    Args:
        args: the command's options.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.place = {"device": args.device, "dtype": DTYPES[args.dtype]}
        self.expert_dtype = DTYPES[args.expert_dtype or args.dtype]
        self.base = nn.Linear(args.width, args.width, **self.place).requires_grad_(False)
        shape = (args.batch, args.tokens, args.width)
        self.x = torch.randn(shape, **self.place).requires_grad_()
        self.grad = torch.randn(shape, **self.place)
        self.models: list[nn.Module] = []

    def weights(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.args.device).softmax(-1).requires_grad_()

    def model(
        self, config: LoraConfig | MoELoraConfig, adapters: tuple[str, ...] = ()
    ) -> PeftModel:
        # All share the base's weight, whose place in memory would else make differences.
        own = nn.Linear(self.args.width, self.args.width, **self.place)
        own.weight, own.bias = self.base.weight, self.base.bias
        model = get_peft_model(nn.Sequential(own), config, autocast_adapter_dtype=False)
        for name in adapters:
            model.add_adapter(name, config)
        if adapters:
            model.base_model.set_adapter(["default", *adapters])
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(self.expert_dtype)
        self.models.append(model)
        return model

    def lora(self, rank: int, count: int = 1) -> PeftModel:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
        return self.model(config, tuple(f"other_{i}" for i in range(1, count)))

    def xlora(self, count: int) -> Forward:
        target = self.lora(self.args.rank // count, count).base_model.model[0]
        layer = XLoraLinearLayer(
            SimpleNamespace(disabled=False), target, target.forward, 0, XLoraConfig(hidden_size=1)
        )
        scalings = self.weights(self.args.batch, self.args.tokens, 1, count)
        scalings = scalings.detach().to(self.expert_dtype).requires_grad_()
        return lambda x: layer.forward(x, scalings=scalings)

    def arrow(self, count: int) -> Forward:
        target = self.lora(self.args.rank // count, count).base_model.model[0]
        config = ArrowConfig(top_k=count)
        config.task_adapter_names = list(target.lora_A)
        layer = ArrowLoraLinearLayer(self.args.width, config)
        layer.build_prototypes(target.lora_A, target.lora_B)

        def forward(x: Tensor) -> Tensor:
            added = layer(x, target.lora_A, target.lora_B, nn.Identity(), target.scaling)
            return target.base_layer(x) + added

        return forward

    def mixture(self, count: int, weights: Tensor | None, top_k: int | None = None) -> Forward:
        model = self.model(
            MoELoraConfig(r=self.args.rank // count, num_experts=count, target_modules=["0"])
        )
        if weights is None:
            return model

        def forward(x: Tensor) -> Tensor:
            with moe_lora.route(model, weights, top_k=top_k):
                return model(x)

        return forward

    def variants(self) -> dict[str, Forward]:
        args, rank = self.args, self.args.rank
        steps: dict[str, Forward] = {"bare layer": self.base, "PEFT LoRA": self.lora(rank)}
        for count in args.experts:
            token = self.weights(args.batch, args.tokens, count)
            sample = self.weights(args.batch, count)
            steps[f"E={count} PEFT, E adapters"] = self.lora(rank // count, count)
            steps[f"E={count} PEFT X-LoRA"] = self.xlora(count)
            steps[f"E={count} PEFT Arrow"] = self.arrow(count)
            steps[f"E={count} uniform"] = self.mixture(count, None)
            steps[f"E={count} per sample"] = self.mixture(count, sample)
            steps[f"E={count} per token"] = self.mixture(count, token)
            if count > args.top_k:
                # Every sample chooses other experts.
                logits = torch.rand(args.batch, count, device=args.device)
                kept = logits.topk(args.top_k).indices
                chosen = torch.zeros_like(logits).scatter(-1, kept, 1 / args.top_k)
                name = f"E={count} top-{args.top_k}"
                steps[name] = self.mixture(count, chosen.requires_grad_(), args.top_k)
        return steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rank", type=int, default=192, help="total rank, E times r")
    parser.add_argument("--experts", type=int, nargs="+", default=[1, 3, 8, 16])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--expert-dtype", choices=DTYPES, help="that of --dtype by default")
    add_options(parser, rounds=31)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    case = Case(args)
    forwards = case.variants()

    def step(forward: Forward) -> Callable[[], None]:
        return lambda: forward(case.x).backward(case.grad)

    steps = {name: step(forward) for name, forward in forwards.items()}
    times = interleaved(steps, args.rounds, device=args.device)
    own = [case.x, *tensors_of(case.base), *(t for m in case.models for t in tensors_of(m))]
    rows = [
        {
            "variant": name,
            "seconds": times.seconds(name),
            "to bare": times.ratio(name, "bare layer"),
            "to PEFT LoRA": times.ratio(name, "PEFT LoRA"),
            "saved MiB": saved_bytes(partial(forwards[name], case.x), own) / MIB,
            "peak MiB": peak_bytes(steps[name], args.device) / MIB,
        }
        for name in steps
    ]
    told = machine(args.device)
    print(told)
    print(f"{vars(args)}\nFLOP limit, to bare: {1 + 3 * args.rank / args.width:.2f}\n")
    print(table_of(rows))
    if args.json:
        result = {"machine": told, "options": vars(args), "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table."""
    columns = ["to bare", "to PEFT LoRA", "saved MiB", "peak MiB"]
    return table(
        ["variant", "ms", *columns],
        [
            [row["variant"], f"{row['seconds'] * 1e3:.2f}", *(f"{row[c]:.2f}" for c in columns)]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
