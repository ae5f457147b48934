"""From a model, or a wrapper around it, to its adapted part and routing state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import nn

from moe_lora.routing.state import RoutingState

ROUTER_ATTRIBUTE = "moe_router"


def routed_module(model: nn.Module) -> nn.Module:
    """Find the module that an adapter was injected into, inside any wrappers.

    Raises:
        ValueError: when the model has no moe_lora adapter, or several parts that have one each.
    """
    found = dict(_adapted_parts(model))
    if len(found) > 1:
        raise ValueError(
            f"Expected one adapted model, but {type(model).__name__} has {len(found)}: "
            f"{sorted(found)}. Call this with each of them."
        )
    for module in found.values():
        return module
    raise ValueError(
        f"Expected a model with a moe_lora adapter, but {type(model).__name__} has none. Inject "
        "one with model.add_adapter(MoELoraConfig(...)) or peft.get_peft_model."
    )


def _adapted_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
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
    """Return the routing state of an adapted model; see `routed_module` for what is raised."""
    return cast(RoutingState, getattr(routed_module(model), ROUTER_ATTRIBUTE).state)


def active_adapters(model: nn.Module) -> list[str]:
    """Return the adapters of an adapted model that act when it is called."""
    routers = getattr(routed_module(model), ROUTER_ATTRIBUTE)
    return list(routers.active_adapters)
