"""The tables of docs/scaling.md, made of plans.

`python -m scaling`, run in `tests/`, writes them into the page.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from reference_tables import written_into
from torch.utils.flop_counter import FlopCounterMode

from moe_lora import MoELoraConfig
from moe_lora.planning import TrainingPlan, example_call, model_on_meta, plan_training

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
MODELS = ("FLUX.1-Fill-dev", "FLUX.2-dev", "Qwen-Image")
PROCESSES = (1, 2, 4, 8, 16)
SIDE, RANK = 1024, 64
PASSES = 3  # forward, the forward pass of checkpointing, gradients of the activations
GIB = 2**30


def plans(name: str) -> dict[int, TrainingPlan]:
    """Return the plan of a model by the number of processes, with one sample in each."""
    model = model_on_meta(name)
    config = MoELoraConfig(r=RANK, lora_alpha=RANK)
    first = plan_training(model, config, example_call(model, SIDE, SIDE))
    # The activations are those of one process in every case.
    return {
        n: replace(plan_training(model, config, shards=n), activations=first.activations)
        for n in PROCESSES
    }


def teraflops(name: str) -> float:
    """Return the operations of a training step of one sample, in 10¹²."""
    model = model_on_meta(name)
    call = example_call(model, SIDE, SIDE)
    assert call is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**call)
    return PASSES * counter.get_total_flops() / 1e12


def sent(plan: TrainingPlan, processes: int) -> int:
    """Return the bytes that a process sends in a step with FSDP2, whose weights are gathered twice.

    Args:
        plan: of that number of processes.
        processes: their number.
    """
    weights = plan.base + plan.adapter
    return (processes - 1) * (2 * weights + plan.gradients)


def tables() -> dict[str, str]:
    """Return the tables by name."""
    found = {name: plans(name) for name in MODELS}
    heads = ["model", *(f"{n} GPU" + "s" * (n > 1) for n in PROCESSES)]
    memory = [
        [name, *(f"{plan.total / GIB:.1f}" for plan in by_number.values())]
        for name, by_number in found.items()
    ]
    cost = []
    for name, by_number in found.items():
        plan, work = by_number[1], teraflops(name)
        ddp = 2 * 7 / 8 * plan.gradients
        numbers = [plan.trained_parameters / 1e6, work, plan.checkpoint / GIB]
        numbers += [ddp / GIB, sent(by_number[8], 8) / GIB]
        cost.append(
            [name, *(f"{number:,.0f}" if number > 99 else f"{number:.1f}" for number in numbers)]
        )
    titles = [
        *("model", "trained parameters, 10⁶", "work per sample, 10¹² operations"),
        *("checkpoint, GiB", "sent per step by DDP, GiB", "sent per step by FSDP2, GiB"),
    ]
    return {"memory": table(heads, memory), "cost": table(titles, cost)}


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_tables(page: str) -> str:
    """Return the page with its present tables."""
    return written_into(page, tables())


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
