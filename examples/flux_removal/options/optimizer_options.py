"""The options of `train.py` for the optimizer and for the average of the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from options.optimizer_names import (
    SCHEDULE_FREE,
    constructor_arguments,
    missing_package,
    optimizer_class,
)
from options.routing_options import option

if TYPE_CHECKING:
    from options.train_options import TrainOptions

OWN_OPTIONS = {"params": "target_modules", "lr": "learning_rate", "weight_decay": "weight_decay"}
"""Arguments of optimizers that are options of `train.py`."""


@dataclass(kw_only=True)
class OptimizerOptions:
    """Choose the optimizer, and an average of the weights."""

    optimizer: str = option(
        "AdamW",
        "Optimizer: a class of torch.optim, such as Adafactor; bnb.NAME for a class of "
        "bitsandbytes, such as bnb.AdamW8bit; Prodigy; AdamWScheduleFree, RAdamScheduleFree or "
        "SGDScheduleFree.",
    )
    optimizer_kwargs: str = option("{}", "Further arguments of the optimizer, as JSON.")
    ema_decay: float | None = option(
        None, "Decay of an exponential moving average of the trained weights, for example 0.999."
    )

    @property
    def optimizer_arguments(self) -> dict[str, Any]:
        """Return `optimizer_kwargs`, with tuples for lists."""
        given = json.loads(self.optimizer_kwargs)
        return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}


def check_optimizer(options: TrainOptions) -> None:
    """Raise for optimizers and arguments that do not exist, and for options without effect.

    Raises:
        ModuleNotFoundError: when the optimizer's package is not installed.
        ValueError: in all other cases.
    """
    name = options.optimizer
    missing = missing_package(name)
    if missing is not None and options.plan:
        return  # a plan needs no package
    if missing is not None:
        raise ModuleNotFoundError(
            f"Expected the package {missing} with `optimizer` {name}, but it is not installed: "
            f"pip install {missing}"
        )
    known = constructor_arguments(optimizer_class(name))
    if "weight_decay" not in known and options.weight_decay != type(options).weight_decay:
        raise ValueError(f"Expected no `weight_decay` with `optimizer` {name}, which has none.")
    _check_arguments(options, known)
    if name == "Prodigy":
        _check_prodigy(options)
    decay = options.ema_decay
    if decay is not None and not 0 < decay < 1:
        raise ValueError(f"Expected `ema_decay` to be in (0, 1), but got {decay}.")
    if decay is not None and name in SCHEDULE_FREE:
        raise ValueError(
            f"Expected no `ema_decay` with `optimizer` {name}, which averages the weights itself."
        )


def _check_arguments(options: TrainOptions, known: dict[str, str]) -> None:
    """Raise for arguments that the optimizer lacks or refuses."""
    try:
        given = json.loads(options.optimizer_kwargs)
    except json.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise ValueError(
            f"Expected `optimizer_kwargs` to be a JSON object, but got {options.optimizer_kwargs}."
        )
    for name in given.keys() & OWN_OPTIONS.keys():
        raise ValueError(f"Expected --{OWN_OPTIONS[name]} instead of {name} in `optimizer_kwargs`.")
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        listed = ", ".join(text for name, text in known.items() if name not in OWN_OPTIONS)
        raise ValueError(
            f"Expected `optimizer_kwargs` to be arguments of {options.optimizer}, but got "
            f"{', '.join(unknown)}. The arguments are {listed}."
        )
    arguments = {"lr": options.learning_rate} | options.optimizer_arguments
    try:
        optimizer_class(options.optimizer)([nn.Parameter(torch.zeros(2, 2))], **arguments)
    # The kinds of errors by which optimizers of torch and others refuse arguments.
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"Expected `optimizer_kwargs` that {options.optimizer} accepts, but got "
            f"{options.optimizer_kwargs}: {error}"
        ) from error


def _check_prodigy(options: TrainOptions) -> None:
    if options.learning_rate == type(options).learning_rate:
        raise ValueError(
            "Expected `learning_rate` with Prodigy, usually 1, but got the default of AdamW. "
            "Prodigy estimates a step size and multiplies it by `learning_rate`."
        )
    if options.router_learning_rate not in (None, options.learning_rate):
        raise ValueError(
            "Expected no `router_learning_rate` with Prodigy, which estimates one step size for "
            "all parameters."
        )
