"""Optimizers: construction, and the weights that they leave in the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from options.optimizer_names import SCHEDULE_FREE, constructor_arguments, optimizer_class


def create_optimizer(
    name: str, groups: Iterable[dict[str, Any]], arguments: dict[str, Any], weight_decay: float
) -> Optimizer:
    """Return an optimizer, ready to step.

    Args:
        name: as in `--optimizer`.
        groups: parameters, each group with its `lr`.
        arguments: further ones of the class.
        weight_decay: for optimizers that have one.
    """
    kind = optimizer_class(name)
    if "weight_decay" in constructor_arguments(kind):
        arguments = {"weight_decay": weight_decay, **arguments}
    optimizer = kind(list(groups), **arguments)
    if is_schedule_free(optimizer):
        use_training_weights(optimizer)
    return optimizer


def innermost(optimizer: Any) -> Optimizer:
    """Return the optimizer inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer is schedule-free: trained weights and weights for use differ."""
    return type(innermost(optimizer)).__name__ in SCHEDULE_FREE


def use_training_weights(optimizer: Any) -> None:
    """Put the weights at which gradients are taken into the model."""
    innermost(optimizer).train()  # type: ignore[attr-defined]  # a method of schedulefree


def use_averaged_weights(optimizer: Any) -> None:
    """Put the average of the steps into the model."""
    innermost(optimizer).eval()  # type: ignore[attr-defined]  # a method of schedulefree
