"""Registry of router classes by their name in configs and checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from moe_lora.routing.routers.base import Router

RouterClass = TypeVar("RouterClass", bound="type[Router]")

_ROUTERS: dict[str, type[Router]] = {}


def register_router(name: str) -> Callable[[RouterClass], RouterClass]:
    """Register a `Router` subclass under a name for `MoELoraConfig(router=...)`.

    The same class may be registered again (a reloaded module).

    Args:
        name: the router's name in configs and checkpoints.

    Returns:
        A decorator that returns the class unchanged.

    Raises:
        ValueError: when another class has the name.
    """

    def register(cls: RouterClass) -> RouterClass:
        registered = _ROUTERS.get(name)
        if registered is not None and _full_name(registered) != _full_name(cls):
            raise ValueError(
                f"Expected a new router name, but {name!r} is already registered for "
                f"{_full_name(registered)}."
            )
        _ROUTERS[name] = cls
        cls.registered_name = name
        return cls

    return register


def router_names() -> tuple[str, ...]:
    """List the registered router names."""
    return tuple(sorted(_ROUTERS))


def router_class(name: str) -> type[Router]:
    """Look up a router class.

    Args:
        name: the registered name.

    Raises:
        ValueError: when no class is registered under the name.
    """
    if name not in _ROUTERS:
        raise ValueError(
            f"Expected `router` to be one of {list(router_names())}, but got {name!r}. Register a "
            "custom router with @moe_lora.register_router first."
        )
    return _ROUTERS[name]


def needs_num_layers(name: str | None, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a router's constructor needs the number of adapted layers.

    It does when it has a parameter `num_layers` with the argument "auto", or without an argument
    and a default.

    Args:
        name: the name of a registered router, or `None`.
        kwargs: the constructor's arguments.

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
