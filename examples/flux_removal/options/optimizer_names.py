"""Optimizers by name: those of torch, bitsandbytes, prodigyopt and schedulefree."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from types import ModuleType

import torch
from torch.optim import Optimizer

BITSANDBYTES = "bnb."
SCHEDULE_FREE = ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
UNFIT = {
    "LBFGS": "it evaluates the model several times per step",
    "SparseAdam": "it requires sparse gradients",
    "Muon": "it requires matrices, and the experts of a layer are one tensor of three dimensions",
    "PytorchLARS": "it is a reference implementation for tests",
}
"""Optimizers that cannot train a mixture, and why."""


def package_of(name: str) -> str:
    """Return the package of the optimizer with this name."""
    if name.startswith(BITSANDBYTES):
        return "bitsandbytes"
    if name == "Prodigy":
        return "prodigyopt"
    return "schedulefree" if name in SCHEDULE_FREE else "torch"


def missing_package(name: str) -> str | None:
    """Return the package that an optimizer requires, if it is not installed."""
    package = package_of(name)
    return None if importlib.util.find_spec(package) else package


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class of an optimizer whose package is installed.

    Raises:
        ValueError: for unknown names, and for optimizers that cannot train a mixture.
    """
    package = package_of(name)
    if package in ("prodigyopt", "schedulefree"):
        return getattr(importlib.import_module(package), name)
    prefix = BITSANDBYTES if package == "bitsandbytes" else ""
    bare = name.removeprefix(prefix)
    if bare in UNFIT:
        raise ValueError(
            f"Expected `optimizer` to be able to train a mixture, but got {name}: {UNFIT[bare]}."
        )
    known = _classes(importlib.import_module("bitsandbytes.optim") if prefix else torch.optim)
    if bare not in known:
        listed = [prefix + other for other in known]
        if not prefix:
            listed += ["Prodigy", *SCHEDULE_FREE, "bnb.AdamW8bit and others of bitsandbytes"]
        raise ValueError(f"Expected `optimizer` to be one of {', '.join(listed)}, but got {name}.")
    return known[bare]


def _classes(module: ModuleType) -> dict[str, type[Optimizer]]:
    found = inspect.getmembers(module, inspect.isclass)
    return {
        name: value
        for name, value in found
        if issubclass(value, Optimizer) and value is not Optimizer and name not in UNFIT
    }


def constructor_arguments(kind: type[Optimizer]) -> dict[str, str]:
    """Return the arguments of an optimizer by name, as `name=default`."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters}
