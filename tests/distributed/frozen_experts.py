"""A mixture of which two experts, one of them new, are trained over all processes and resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import Case
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from training import Report, Wrap, average, loss_of, optimizer_of, whole

import moe_lora

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
TRAINED = ["background_expert", "shadow"]


def grown(case: Case) -> PeftModel:
    model = case.model()
    moe_lora.add_expert(model, "shadow", init=False, router_logit=0.0)
    moe_lora.train_only(model, TRAINED)
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Tensor]) -> Tensor:
    loss = loss_of(model, inputs)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e3)  # clips nothing, but changes a copy
    optimizer.step()
    optimizer.zero_grad()
    return loss


def frozen(model: nn.Module) -> list[Tensor]:
    own = [p for name, p in model.named_parameters() if name.endswith("_frozen")]
    return [whole(p.detach()).clone() for p in own]


def values(model: nn.Module) -> list[Tensor]:
    return [whole(p.detach()).clone() for p in model.parameters() if p.requires_grad]


def train_and_resume(folder: Path, wrap: Wrap, name: str) -> Report:
    """Compare with one process; save after two steps, and go on in a new model."""
    case = Case(folder, "flux")
    alone, model = grown(case), grown(case)
    before, start = frozen(model), values(model)
    wrapped = wrap(model)
    optimizers = optimizer_of(alone), optimizer_of(wrapped)
    report: dict[str, Any] = {"loss": 0.0}

    def both() -> None:
        ours = step(alone, optimizers[0], case.inputs)
        theirs = average(step(wrapped, optimizers[1], case.share()))
        report["loss"] = max(report["loss"], (theirs - ours).abs().item())

    both()
    both()
    parameters = copy.deepcopy(get_model_state_dict(model, options=WHOLE))
    momenta = copy.deepcopy(get_optimizer_state_dict(model, optimizers[1], options=WHOLE))
    if dist.get_rank() == 0:
        model.save_pretrained(folder / name, state_dict=parameters)
    dist.barrier()
    both()
    pairs = zip(frozen(wrapped), before, strict=True)
    report["frozen"] = all(torch.equal(found, old) for found, old in pairs)
    moved = [(a - b).abs().max().item() for a, b in zip(values(wrapped), start, strict=True)]
    report["least_moved"] = min(moved)

    again = grown(case)
    resumed = wrap(again)
    optimizer = optimizer_of(resumed)
    mine = dist.get_rank() == 0
    set_model_state_dict(again, parameters if mine else {}, options=BROADCAST)
    set_optimizer_state_dict(again, optimizer, momenta if mine else {}, options=BROADCAST)
    step(resumed, optimizer, case.share())
    pairs = zip(values(resumed), values(wrapped), strict=True)
    report["resumed"] = max((a - b).abs().max().item() for a, b in pairs)
    report["refused"] = _refusal(wrapped)
    return report


def _refusal(wrapped: nn.Module) -> str:
    """Return the error of growing a model that several processes train already."""
    try:
        moe_lora.add_expert(wrapped, "late")
    except ValueError as error:
        return str(error)
    return "none"
