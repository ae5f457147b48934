"""One of the processes that tests/test_distributed.py starts.

Usage: python -m torch.distributed.run --nproc_per_node 2 worker.py FOLDER SCENARIO...
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import Case, ddp, fsdp
from frozen_experts import train_and_resume
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from training import (
    PHASES,
    Report,
    Wrap,
    average,
    compare_gradients,
    loss_of,
    new_report,
    optimizer_of,
    output,
    train,
    whole,
)

from moe_lora import MoELoraConfig, Router
from moe_lora.planning import plan_training

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def trains(folder: Path, kind: str, wrap: Wrap) -> Report:
    phases = PHASES if kind == "flux" else tuple(p for p in PHASES if p != "given")
    return train(Case(folder, kind), wrap, phases)


def cold_experts(folder: Path, wrap: Wrap) -> Report:
    """Let the router leave experts out in every step, and look at their gradients."""
    case = Case(folder, "net", routing_strategy="topk", top_k=2)
    report = train(case, wrap, ("routed",) * 3)
    wrapped = wrap(case.model())
    loss_of(wrapped, case.share()).backward()
    of_experts: list[Tensor] = []
    for name, parameter in wrapped.named_parameters():
        if "lora_A" in name:
            assert parameter.grad is not None, name
            of_experts.append(whole(parameter.grad).abs().sum((1, 2)))
    report["by_expert"] = torch.stack(of_experts).sum(0).tolist()
    return report


def checkpointed(folder: Path) -> Report:
    case = Case(folder, "flux")
    plain = case.model

    def model() -> PeftModel:
        made = plain()
        made.get_base_model().train().enable_gradient_checkpointing()
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return made

    case.model = model  # type: ignore[method-assign]
    return train(case, ddp)


def passes_that_differ(folder: Path) -> Report:
    """A pass asks the router and the next one does not; then the processes choose differently."""
    case = Case(folder, "flux")
    report, alone, wrapped = new_report(), case.model(), ddp(case.model())
    assert isinstance(wrapped, DistributedDataParallel)
    for _ in range(2):
        for phase in ("routed", "uniform"):
            loss_of(alone, case.inputs, phase).backward()
        with wrapped.no_sync():
            loss_of(wrapped, case.share(), "routed").backward()
        loss_of(wrapped, case.share(), "uniform").backward()
        compare_gradients(alone, wrapped, report)
        for model in (alone, wrapped):
            model.zero_grad()
    phase = "uniform" if dist.get_rank() else "routed"
    loss_of(wrapped, case.share(), phase).backward()
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            mean = parameter.grad.clone()
            dist.all_reduce(mean)
            apart = (mean / dist.get_world_size() - parameter.grad).abs().max().item()
            report["gradient"] = max(report["gradient"], apart)
    return report


def saves_and_resumes(folder: Path, wrap: Wrap) -> Report:
    """Save, train one step more; load into a new model, train that step: the same must come out."""
    case = Case(folder, "flux")
    name = "ddp" if wrap is ddp else "fsdp"
    model = case.model()
    wrapped, target = wrap(model), folder / f"saved_{name}"
    optimizer = optimizer_of(wrapped)

    def step() -> None:
        loss_of(wrapped, case.share()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    # Copies, since what is not sharded comes as it is, and the next step changes it.
    parameters = copy.deepcopy(get_model_state_dict(model, options=WHOLE))
    momenta = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=WHOLE))
    if dist.get_rank() == 0:
        model.save_pretrained(target, state_dict=parameters)
        alone = case.model()
        alone.load_state_dict(parameters)
        torch.save(output(alone, case.inputs), folder / f"output_{name}.pt")
    dist.barrier()
    step()
    expected = [whole(parameter).clone() for parameter in wrapped.parameters()]

    model = case.model()
    wrapped = wrap(model)
    optimizer = optimizer_of(wrapped)
    broadcast = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    mine = dist.get_rank() == 0
    set_model_state_dict(model, parameters if mine else {}, options=broadcast)
    set_optimizer_state_dict(model, optimizer, momenta if mine else {}, options=broadcast)
    step()
    found = [whole(parameter) for parameter in wrapped.parameters()]
    apart = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    return {"resumed": apart, "keys": sorted(parameters)}


def shards(folder: Path) -> Report:
    """Count the bytes of a shard, as the mean over the processes, and plan them."""
    case = Case(folder, "flux")
    model = fsdp(case.model())
    optimizer = optimizer_of(model)
    loss_of(model, case.share()).backward()
    optimizer.step()

    def mean_bytes(tensors: Iterable[Tensor]) -> float:
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        counted = torch.tensor(float(sum(t.numel() * t.element_size() for t in local)))
        dist.all_reduce(counted)
        return counted.item() / dist.get_world_size()

    parameters = list(model.parameters())
    states = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    config = MoELoraConfig(**case.config)
    plan = plan_training(case.base(), config, base_precision="fp32", shards=dist.get_world_size())
    return {
        "base": mean_bytes(p for p in parameters if not p.requires_grad),
        "adapter": mean_bytes(p for p in parameters if p.requires_grad),
        "gradients": mean_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer": mean_bytes(states),
        "plan": plan.as_dict(),
    }


def mixed_precision(folder: Path) -> Report:
    """Shard with bfloat16 parameters and see in which dtype the router works."""
    case = Case(folder, "flux")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wrapped, seen = fsdp(case.model(), policy), set()

    def note(router: nn.Module, *_: Any) -> None:
        seen.update(str(parameter.dtype) for parameter in router.parameters())

    for module in wrapped.modules():
        if isinstance(module, Router):
            module.register_forward_hook(note)
    out = output(wrapped, case.share())
    out.float().square().mean().backward()
    missing = [n for n, p in wrapped.named_parameters() if p.requires_grad and p.grad is None]
    return {"router": sorted(seen), "output": str(out.dtype), "missing": missing}


def accelerated(folder: Path) -> Report:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator, case = Accelerator(cpu=True, kwargs_handlers=[unused]), Case(folder, "flux")
    report = train(case, lambda model: accelerator.prepare(model))
    wrapped = accelerator.prepare(case.model())
    assert isinstance(wrapped, DistributedDataParallel)
    keys = accelerator.get_state_dict(wrapped)
    report["keys"] = sorted(keys)
    return report


def deepspeed(folder: Path, stage: int) -> Report:
    import deepspeed as library

    case, report = Case(folder, "flux"), {"loss": 0.0}
    alone, model = case.model(), case.model()
    first, second = (
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        for m in (alone, model)
    )
    engine, *_ = library.initialize(
        model=model,
        optimizer=second,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        },
    )
    engine.eval()
    for phase in ("uniform", "uniform", "routed", "routed"):
        ours, theirs = loss_of(alone, case.inputs, phase), loss_of(engine, case.share(), phase)
        report["loss"] = max(report["loss"], (average(theirs) - ours).abs().item())
        ours.backward()
        first.step()
        first.zero_grad()
        engine.backward(theirs)
        engine.step()
    return report


SCENARIOS: dict[str, Callable[[Path], Report]] = {
    "ddp-flux": lambda folder: trains(folder, "flux", ddp),
    "ddp-net": lambda folder: trains(folder, "net", ddp),
    "ddp-views": lambda folder: train(
        Case(folder, "flux"),
        lambda m: DistributedDataParallel(
            m, find_unused_parameters=True, gradient_as_bucket_view=True
        ),
    ),
    "ddp-accumulation": lambda folder: train(Case(folder, "flux"), ddp, accumulate=2),
    "ddp-checkpointing": checkpointed,
    "ddp-passes-that-differ": passes_that_differ,
    "ddp-cold-experts": lambda folder: cold_experts(folder, ddp),
    "ddp-saving": lambda folder: saves_and_resumes(folder, ddp),
    "accelerate": accelerated,
    "fsdp-flux": lambda folder: trains(folder, "flux", fsdp),
    "fsdp-net": lambda folder: trains(folder, "net", fsdp),
    "fsdp-cold-experts": lambda folder: cold_experts(folder, fsdp),
    "fsdp-saving": lambda folder: saves_and_resumes(folder, fsdp),
    "fsdp-mixed-precision": mixed_precision,
    "fsdp-shards": shards,
    "ddp-frozen-experts": lambda folder: train_and_resume(folder, ddp, "frozen_ddp"),
    "fsdp-frozen-experts": lambda folder: train_and_resume(folder, fsdp, "frozen_fsdp"),
    "deepspeed-2": lambda folder: deepspeed(folder, 2),
    "deepspeed-3": lambda folder: deepspeed(folder, 3),
}


def main(folder: Path, names: list[str]) -> None:
    """Run scenarios; process 0 writes what they report, or where they failed, as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name in names:
        torch.manual_seed(0)
        try:
            report = SCENARIOS[name](folder)
        except Exception:
            report = {"failed": traceback.format_exc()}
        if dist.get_rank() == 0 or "failed" in report:
            path = folder / f"{name}.{dist.get_rank()}.json"
            path.write_text(json.dumps(report), encoding="utf-8")
        if "failed" in report:
            raise SystemExit(1)  # the other process may wait for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
