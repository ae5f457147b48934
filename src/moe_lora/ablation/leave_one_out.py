"""Run a model with one expert left out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from moe_lora.adapter_routers import AdapterRouters
from moe_lora.routing.control import ROUTER_ATTRIBUTE, routed_module, routing_state
from moe_lora.routing.steering import Ablation

Batch = TypeVar("Batch")
Evaluate = Callable[[nn.Module, Batch], Mapping[str, float | Tensor]]

Observations = dict[str, Tensor]
"""By component: `(E + 1, n)`, float64, the whole mixture first."""


@contextmanager
def knocked_out(
    model: nn.Module, expert: str, *, adapter_name: str = "default", renormalise: bool = False
) -> Iterator[None]:
    """Leave an expert out inside the context: its weights are 0, whatever decides them.

    Contexts nest: all that are named are left out. It acts in the thread, or asynchronous task,
    that opened it.

    Args:
        model: the adapted model, or a wrapper around it.
        expert: its name.
        adapter_name: whose expert.
        renormalise: divide the others' weights by their sum; rows without any other weight stay 0.

    Raises:
        ValueError: for an unknown adapter or expert.
    """
    state = routing_state(model)
    names = _experts_of(model, adapter_name)
    if expert not in names:
        raise ValueError(f"Expected `expert` to be one of {list(names)}, but got {expert!r}.")
    ablation = Ablation(adapter_name, names.index(expert), renormalise)
    with state.steered(ablations=(ablation,)):
        yield


def observe(
    model: nn.Module,
    batch: Batch,
    evaluate: Evaluate[Batch],
    *,
    adapter_name: str,
    renormalise: bool,
    seed: int,
) -> Observations:
    """Evaluate a batch with the whole mixture, and then without each expert.

    Args:
        model: the adapted model, or a wrapper around it.
        batch: what `evaluate` takes.
        evaluate: returns losses and metrics by name.
        adapter_name: whose experts.
        renormalise: as in `knocked_out`.
        seed: of torch's global random generators, the same for every run.

    Returns:
        The values of every component, without those that are NaN in all runs.

    Raises:
        ValueError: when the runs return different components, or values that are not finite.
    """
    experts = acting_experts(model, adapter_name)
    torch.manual_seed(seed)
    runs = [_run(model, batch, evaluate)]
    for expert in experts:
        torch.manual_seed(seed)
        with knocked_out(model, expert, adapter_name=adapter_name, renormalise=renormalise):
            runs.append(_run(model, batch, evaluate))
    return _stacked(runs, experts)


def _experts_of(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    known = routing_state(model).expert_names
    if adapter_name not in known:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(known)}, but got {adapter_name!r}."
        )
    return known[adapter_name]


def acting_experts(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """Return the experts of an adapter.

    Raises:
        ValueError: when the adapter does not exist or does not act.
    """
    names = _experts_of(model, adapter_name)
    routers = getattr(routed_module(model), ROUTER_ATTRIBUTE)
    assert isinstance(routers, AdapterRouters)
    idle = {
        "it is not active": adapter_name not in routers.active_adapters,
        "adapters are disabled": routers.disable_adapters,
        "it is merged into the base weights": adapter_name in routers.merged_adapters,
    }
    for reason, holds in idle.items():
        if holds:
            raise ValueError(f"Expected adapter {adapter_name!r} to act, but {reason}.")
    return names


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluate inside the context, and put back what that changes.

    Modes, routing mode, router inputs, statistics and the last decisions of the model, and torch's
    global random generators.
    """
    state = routing_state(model)
    training = {module: module.training for module in model.modules()}
    mode, given, stats = state.mode, state.given, state.stats
    decisions = state.in_thread.decisions
    state.stats = copy.deepcopy(stats)
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(devices)), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, trains in training.items():
            module.training = trains
        state.mode, state.given, state.stats = mode, given, stats
        state.require_routing()
        state.in_thread.decisions = decisions


def _run(model: nn.Module, batch: Batch, evaluate: Evaluate[Batch]) -> dict[str, Tensor]:
    state = routing_state(model)
    state.in_thread.has_run = False
    values = evaluate(model, batch)
    if not state.in_thread.has_run:
        raise ValueError("Expected `evaluate` to run the model that it is given, but it did not.")
    found = {}
    for name, value in values.items():
        tensor = torch.as_tensor(value).detach().to("cpu", torch.float64)
        if tensor.ndim > 1:
            raise ValueError(
                f"Expected `evaluate` to return a number or a tensor of shape (B,) for {name!r}, "
                f"but got shape {tuple(tensor.shape)}."
            )
        found[name] = tensor.reshape(-1)
    return found


def _stacked(runs: list[dict[str, Tensor]], expert_names: tuple[str, ...]) -> Observations:
    """Lay the runs of one batch side by side, without what is NaN in all."""
    whole, stacked = runs[0], {}
    for run, expert in zip(runs[1:], expert_names, strict=True):
        told, expected = ({k: len(v) for k, v in r.items()} for r in (run, whole))
        if told != expected:
            raise ValueError(
                f"Expected `evaluate` to return the same components without {expert!r} as of the "
                f"whole mixture, with as many values, {expected}, but got {told}."
            )
    for name in whole:
        values = torch.stack([run[name] for run in runs])
        values = values[:, ~values.isnan().all(0)]
        if not values.isfinite().all():
            raise ValueError(
                f"Expected {name!r} to be finite, or NaN with and without every expert, but got "
                f"{values.tolist()}: the whole mixture, then without {', '.join(expert_names)}."
            )
        stacked[name] = values
    return stacked
