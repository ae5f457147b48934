"""Training over all processes and, beside it, in each process alone over the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from cases import Case
from peft import PeftModel
from torch import Tensor, nn

import moe_lora
from moe_lora import Router

PHASES = ("uniform", "uniform", "routed", "given", "uniform", "routed")
GIVEN = (0.2, 0.5, 0.3)

Report = dict[str, Any]
Wrap = Callable[[PeftModel], nn.Module]


def whole(tensor: Tensor) -> Tensor:
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def output(model: nn.Module, inputs: dict[str, Tensor], phase: str = "routed") -> Tensor:
    moe_lora.set_routing_mode(model, "uniform" if phase == "uniform" else "routed")
    given = phase == "given"
    with moe_lora.route(model, torch.tensor(GIVEN)) if given else nullcontext():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def loss_of(model: nn.Module, inputs: dict[str, Tensor], phase: str = "routed") -> Tensor:
    return output(model, inputs, phase).float().square().mean()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)


def average(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def pairs(alone: nn.Module, wrapped: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (name, ours), theirs in zip(alone.named_parameters(), wrapped.parameters(), strict=True):
        if ours.requires_grad:
            yield name, ours, theirs


def compare_gradients(alone: nn.Module, wrapped: nn.Module, report: Report) -> None:
    for name, ours, theirs in pairs(alone, wrapped):
        if (ours.grad is None) != (theirs.grad is None):
            report["none_in_one"].append(name)
        elif ours.grad is not None and theirs.grad is not None:
            error = (ours.grad - whole(theirs.grad)).abs().max().item()
            report["gradient"] = max(report["gradient"], error)


def new_report() -> Report:
    return {"loss": 0.0, "gradient": 0.0, "none_in_one": [], "router_steps": 0}


def train(case: Case, wrap: Wrap, phases: tuple[str, ...] = PHASES, accumulate: int = 1) -> Report:
    """Train both for one step per phase and compare losses and gradients."""
    report, alone, wrapped = new_report(), case.model(), wrap(case.model())
    optimizers = optimizer_of(alone), optimizer_of(wrapped)
    for phase in phases:
        for i in range(accumulate):
            ours = loss_of(alone, case.inputs, phase)
            last = i == accumulate - 1
            with nullcontext() if last else wrapped.no_sync():  # type: ignore[operator]
                theirs = loss_of(wrapped, case.share(), phase)
                theirs.backward()
            ours.backward()
            report["loss"] = max(report["loss"], (average(theirs) - ours).abs().item())
        compare_gradients(alone, wrapped, report)
        routers = [m for m in alone.modules() if isinstance(m, Router)]
        asked = any(p.grad is not None for m in routers for p in m.parameters())
        report["router_steps"] += asked
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    report["parameter"] = max(
        (ours - whole(theirs)).detach().abs().max().item()
        for _, ours, theirs in pairs(alone, wrapped)
    )
    return report
