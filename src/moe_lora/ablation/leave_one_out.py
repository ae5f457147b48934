"""Evaluate a model without one of its experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from moe_lora.routing.lookup import ROUTER_ATTRIBUTE, routed_module, routing_state
from moe_lora.routing.steering import Ablation
from moe_lora.tuner.router_container.container import AdapterRouters

Batch = TypeVar("Batch")
Evaluate = Callable[[nn.Module, Batch], Mapping[str, float | Tensor]]

Observations = dict[str, Tensor]
"""By component: `(E + 1, n)`, float64; row 0 with all experts, row e + 1 without expert e."""


@contextmanager
def ablate_expert(
    model: nn.Module, expert: str, *, adapter_name: str = "default", renormalize: bool = False
) -> Iterator[None]:
    """Set the routing weights of one expert to 0 inside the context.

    This applies to weights from a router, from a routing mode and from `moe_lora.route`. Nested
    contexts ablate all named experts. The context affects only the thread or asynchronous task that
    entered it.

    Args:
        model: the adapted model, or a wrapper around it.
        expert: name of the expert.
        adapter_name: name of the adapter that the expert belongs to.
        renormalize: divide the remaining weights by their sum; rows whose remaining weights are all
            0 stay 0.

    Raises:
        ValueError: if the adapter or the expert is unknown.

    Example:
        >>> from peft import get_peft_model
        >>> from moe_lora import MoELoraConfig
        >>> config = MoELoraConfig(r=1, lora_alpha=1, target_modules=["0"], num_experts=2)
        >>> model = get_peft_model(nn.Sequential(nn.Linear(1, 2, bias=False)), config)
        >>> _ = nn.init.zeros_(model.base_model.model[0].base_layer.weight)
        >>> experts = model.base_model.model[0].moe_lora_experts["default"]
        >>> _ = experts.lora_A.data.fill_(1)
        >>> experts.lora_B.data = torch.eye(2).unsqueeze(-1)  # one output for each expert
        >>> with torch.no_grad(), ablate_expert(model, "expert_0"):
        ...     model(torch.ones(1, 1))
        tensor([[0.0000, 0.5000]])
    """
    state = routing_state(model)
    names = _expert_names(model, adapter_name)
    if expert not in names:
        raise ValueError(f"Expected `expert` to be one of {list(names)}, but got {expert!r}.")
    ablation = Ablation(adapter_name, names.index(expert), renormalize)
    with state.steer(ablations=(ablation,)):
        yield


def observe(
    model: nn.Module,
    batch: Batch,
    evaluate: Evaluate[Batch],
    *,
    adapter_name: str,
    renormalize: bool,
    seed: int,
) -> Observations:
    """Evaluate a batch with the whole mixture, then without each of its experts.

    Args:
        model: the adapted model, or a wrapper around it.
        batch: second argument of `evaluate`.
        evaluate: function that returns losses and metrics by name.
        adapter_name: name of the adapter.
        renormalize: see `ablate_expert`.
        seed: seed of torch's global random generators, reset before every run.

    Returns:
        The values of every component, without entries that are NaN in all runs.

    Raises:
        ValueError: if the runs return different components, or values that are not finite.
    """
    experts = active_expert_names(model, adapter_name)
    torch.manual_seed(seed)
    runs = [_run(model, batch, evaluate)]
    for expert in experts:
        torch.manual_seed(seed)
        with ablate_expert(model, expert, adapter_name=adapter_name, renormalize=renormalize):
            runs.append(_run(model, batch, evaluate))
    return _stack_runs(runs, experts)


def _expert_names(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    known = routing_state(model).expert_names
    if adapter_name not in known:
        raise ValueError(
            f"Expected `adapter_name` to be one of {sorted(known)}, but got {adapter_name!r}."
        )
    return known[adapter_name]


def active_expert_names(model: nn.Module, adapter_name: str) -> tuple[str, ...]:
    """Return the expert names of an adapter that contributes to the model's outputs.

    Raises:
        ValueError: if the adapter is unknown, inactive, disabled or merged.
    """
    names = _expert_names(model, adapter_name)
    routers = getattr(routed_module(model), ROUTER_ATTRIBUTE)
    assert isinstance(routers, AdapterRouters)
    if adapter_name not in routers.active_adapters:
        raise ValueError(
            f"Adapter {adapter_name!r} is not active. Activate it with "
            f"model.set_adapter({adapter_name!r})."
        )
    if routers.disable_adapters:
        raise ValueError(
            f"Adapter {adapter_name!r} is disabled. Enable adapters before the ablation."
        )
    if adapter_name in routers.merged_adapters:
        raise ValueError(
            f"Adapter {adapter_name!r} is merged into the base weights. Unmerge it first with "
            "moe_lora.unmerge(model)."
        )
    return names


@contextmanager
def restored_state(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation inside the context, and restore the model's state afterwards.

    The context disables gradients and sets `model.eval()`. At its end it restores the training
    modes, routing mode, router inputs, statistics and last routing decisions of the model, and
    torch's global random generators.
    """
    state = routing_state(model)
    training = {module: module.training for module in model.modules()}
    mode, given, stats = state.mode, state.given, state.stats
    decisions = state.thread_state.decisions
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
        state.update_routed_adapters()
        state.thread_state.decisions = decisions


def _run(model: nn.Module, batch: Batch, evaluate: Evaluate[Batch]) -> dict[str, Tensor]:
    state = routing_state(model)
    state.thread_state.has_run = False
    values = evaluate(model, batch)
    if not state.thread_state.has_run:
        raise ValueError(
            "Expected `evaluate` to call its first argument, the model, but it did not."
        )
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


def _stack_runs(runs: list[dict[str, Tensor]], expert_names: tuple[str, ...]) -> Observations:
    """Stack the runs of one batch, without entries that are NaN in all of them."""
    whole, stacked = runs[0], {}
    for run, expert in zip(runs[1:], expert_names, strict=True):
        found, expected = ({k: len(v) for k, v in r.items()} for r in (run, whole))
        if found != expected:
            raise ValueError(
                f"Expected `evaluate` to return the same components and numbers of values without "
                f"{expert!r} as with the whole mixture, {expected}, but got {found}."
            )
    for name in whole:
        values = torch.stack([run[name] for run in runs])
        values = values[:, ~values.isnan().all(0)]
        if not values.isfinite().all():
            raise ValueError(
                f"Expected {name!r} to be finite, or NaN in all runs, but got "
                f"{values.tolist()} with the whole mixture, then without {', '.join(expert_names)}."
            )
        stacked[name] = values
    return stacked
