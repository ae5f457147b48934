"""Detection of optimizers that hold parameters which a model no longer has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

_REPLACED_BY: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The function that replaced a parameter, by parameter."""

_hooks: list[Any] = []


def mark_replaced(parameters: Iterable[nn.Parameter], function: str) -> None:
    """Make every optimizer that holds a replaced parameter raise in its next step.

    Without it, such an optimizer would go on without training anything: the parameters that it
    holds get no gradients.

    Args:
        parameters: the parameters that the model had before.
        function: the name of the function that replaced them, for the message.
    """
    for parameter in parameters:
        _REPLACED_BY[parameter] = function
    if _REPLACED_BY and not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check_optimizer))


def _check_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups if _REPLACED_BY else ():
        for parameter in group["params"]:
            if parameter in _REPLACED_BY:
                raise RuntimeError(
                    f"Expected an optimizer of the model's parameters, but "
                    f"{_REPLACED_BY[parameter]} has replaced some of them since the "
                    f"{type(optimizer).__name__} was made. Make a new optimizer (and a new "
                    "DistributedDataParallel) after it."
                )
