"""The arguments of a call by parameter name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from torch import nn


def named_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of `model(*args, **kwargs)` by parameter name.

    Args:
        model: the called model.
        args: positional arguments.
        kwargs: keyword arguments; those in the model's `**kwargs` keep their names.

    Raises:
        TypeError: when the model's `forward` does not take these arguments.
    """
    signature = _signature(type(model).forward)
    arguments = dict(signature.bind_partial(model, *args, **kwargs).arguments)
    arguments.pop(next(iter(signature.parameters)), None)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(name, {}))
    return arguments


@lru_cache(maxsize=128)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)
