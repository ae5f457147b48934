"""Rollback of a model to its previous state when an operation fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from moe_lora.routing.weights.context import RoutingContext


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Restore a model when the context ends in an error, for example in an adapter's injection.

    Submodules, hooks, attributes and `requires_grad` are restored; the values of parameters are
    not, since injecting an adapter changes none.

    Args:
        model: the model, or a wrapper around it.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modules = list(model.modules())
    contexts = {
        id(value): value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, RoutingContext)
    }
    snapshots = [(owner, _copy(vars(owner))) for owner in (*modules, *contexts.values())]
    try:
        yield
    except BaseException:
        for owner, (attributes, contents) in snapshots:
            vars(owner).clear()
            vars(owner).update(attributes)
            for container, content in contents:
                _refill(container, content)
        for parameter, requires_grad in flags:
            parameter.requires_grad = requires_grad
        raise


Container = dict[Any, Any] | list[Any] | set[Any]
_CONTAINERS = (dict, OrderedDict, list, set)


def _copy(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Container, Container]]]:
    # Exact types only: subclasses may be frozen, as diffusers' configs are, and then never change.
    contents = [
        (value, value.copy()) for value in attributes.values() if type(value) in _CONTAINERS
    ]
    return dict(attributes), contents


def _refill(container: Container, content: Container) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
