"""All or nothing: a model that is given back as it was when something fails."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from moe_lora.routing.weights.context import RoutingContext


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo what an adapter's injection did to a model when the context ends in an error.

    Submodules, hooks, attributes and `requires_grad` are put back; the values of parameters are
    not looked at, since injecting an adapter changes none.

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
    kept = [(held, _copy(vars(held))) for held in (*modules, *contexts.values())]
    try:
        yield
    except BaseException:
        for held, (attributes, contents) in kept:
            vars(held).clear()
            vars(held).update(attributes)
            for container, content in contents:
                _refill(container, content)
        for parameter, requires_grad in flags:
            parameter.requires_grad = requires_grad
        raise


Container = dict[Any, Any] | list[Any] | set[Any]
_CONTAINERS = (dict, OrderedDict, list, set)


def _copy(attributes: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[Container, Container]]]:
    # Subclasses may be frozen, as diffusers' configs are, and are then of no interest.
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
