"""Lookup of the adapted module and its routing state in a model or a wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from moe_lora.routing.state import RoutingState

ROUTER_ATTRIBUTE = "moe_router"


def routed_module(model: nn.Module) -> nn.Module:
    """Find the module with the injected adapter, inside any wrappers.

    Args:
        model: the adapted model, or a wrapper around it.

    Raises:
        ValueError: when the model has no moe_lora adapter, or several adapted modules.
    """
    found = dict(_iter_adapted_modules(model))
    if len(found) > 1:
        raise ValueError(
            f"Expected one adapted model, but {type(model).__name__} has {len(found)}: "
            f"{sorted(found)}. Call the function once for each of them."
        )
    for module in found.values():
        return module
    raise ValueError(
        f"Expected a model with a moe_lora adapter, but {type(model).__name__} has none. Inject "
        "one with model.add_adapter(MoELoraConfig(...)) or peft.get_peft_model."
    )


def _iter_adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if ROUTER_ATTRIBUTE in module._modules:
            yield path, module
            continue
        waiting += [(f"{path}.{n}".lstrip("."), child) for n, child in module.named_children()]


def routing_state(model: nn.Module) -> RoutingState:
    """Return the routing state of an adapted model.

    Args:
        model: the adapted model, or a wrapper around it.

    Raises:
        ValueError: as `routed_module`.
    """
    return cast(RoutingState, getattr(routed_module(model), ROUTER_ATTRIBUTE).state)


def active_adapters(model: nn.Module) -> list[str]:
    """Return the active adapters of an adapted model.

    Args:
        model: the adapted model, or a wrapper around it.

    Raises:
        ValueError: as `routed_module`.
    """
    routers = getattr(routed_module(model), ROUTER_ATTRIBUTE)
    return list(routers.active_adapters)
