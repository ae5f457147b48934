"""Router classes by name, so that a saved adapter can name its router."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from moe_lora.routing.routers.base import Router

RouterClass = TypeVar("RouterClass", bound="type[Router]")

_ROUTERS: dict[str, type[Router]] = {}


def register_router(name: str) -> Callable[[RouterClass], RouterClass]:
    """Register a `Router` subclass under a name that `MoELoraConfig(router=...)` accepts.

    The same class may be registered again (a reloaded module); a different class may not take a
    name that is in use.

    Args:
        name: what configs and checkpoints call the router.

    Returns:
        A decorator that returns the class unchanged.

    Raises:
        ValueError: when another class holds the name.
    """

    def register(cls: RouterClass) -> RouterClass:
        held = _ROUTERS.get(name)
        if held is not None and _full_name(held) != _full_name(cls):
            raise ValueError(
                f"Expected a free router name, but {name!r} already names {_full_name(held)}."
            )
        _ROUTERS[name] = cls
        cls.registered_name = name
        return cls

    return register


def router_names() -> tuple[str, ...]:
    """List the registered router names."""
    return tuple(sorted(_ROUTERS))


def router_class(name: str) -> type[Router]:
    """Look a router class up.

    Raises:
        ValueError: when no class is registered under the name.
    """
    if name not in _ROUTERS:
        raise ValueError(
            f"Expected `router` to be one of {list(router_names())}, but got {name!r}. A router "
            "of your own must be registered with @moe_lora.register_router before it is named."
        )
    return _ROUTERS[name]


def counts_layers(name: str | None, kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a router must be told the number of the adapted layers.

    That is so when its constructor has a parameter `num_layers`, and that is "auto" or, having no
    default, missing.

    Args:
        name: of a registered router; or `None`.
        kwargs: the arguments that are given.

    Raises:
        ValueError: when no class is registered under the name.
    """
    if name is None:
        return False
    parameter = inspect.signature(router_class(name)).parameters.get("num_layers")
    if parameter is None:
        return False
    missing = "num_layers" not in kwargs and parameter.default is inspect.Parameter.empty
    return missing or kwargs.get("num_layers") == "auto"


def _full_name(cls: type[Router]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
